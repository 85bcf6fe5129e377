"""ModelRunner: the logits of a whole forward, the same bits packed and not, whatever else shares the batch."""

from __future__ import annotations

import copy

import pytest
import torch

import simsd
from simsd import SimsdError
from simsd.models.block_table import BlockTable
from simsd.models.fused import layers_of
from simsd.models.runner import ModelRunner
from simsd.models.stock import StockLayers
from simsd_kernels import INF
from small_checkpoints import MASK_ID, VOCABULARY, stock_model

BLOCK, KV_SLOTS = 4, 48
KINDS = pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])


def load(moe: bool = False, deterministic: bool = True, dtype: str = "float32", **changes) -> simsd.LoadedModel:
    source = stock_model(moe, **changes)
    return simsd.load(source, mask_token_id=MASK_ID, block_length=BLOCK, dtype=dtype, deterministic=deterministic)


class Batch:
    """Sequences of random tokens that go in by and by. A sequence's row r of a forward may be dead."""

    def __init__(self, sequences: int, seed: int = 1) -> None:
        self.tokens = torch.randint(3, VOCABULARY, (sequences, 32), generator=torch.Generator().manual_seed(seed))
        self.done = [0] * sequences
        self.generator = torch.Generator().manual_seed(seed)

    def rows(self, counts: list[int], width: int):
        """The next counts[b] tokens of sequence b, at random columns of [B, width], as ModelRunner.forward takes it."""
        shape = len(counts), width
        tokens, positions = torch.full(shape, VOCABULARY - 1), torch.full(shape, 7, dtype=torch.int32)
        slots, clock = (torch.full(shape, -1, dtype=torch.int32) for _ in range(2))
        for b, count in enumerate(counts):
            begin, end = self.done[b], self.done[b] + count
            columns = torch.randperm(width, generator=self.generator)[:count].sort().values
            position = torch.arange(begin, end, dtype=torch.int32)
            tokens[b, columns], positions[b, columns] = self.tokens[b, begin:end], position
            slots[b, columns], clock[b, columns] = position, position // BLOCK
            self.done[b] = end
        position = torch.arange(KV_SLOTS, dtype=torch.int32)
        birth = torch.where(position < torch.tensor(self.done)[:, None], position // BLOCK, INF).to(torch.int32)
        return tokens, positions, slots, clock, birth, torch.full_like(birth, INF)


def live_rows(slots: torch.Tensor) -> torch.Tensor:
    return (slots >= 0).flatten().nonzero().squeeze(1)


def decode(loaded, schedule: list[list[int]], width: int, packed: bool, batch: Batch | None = None, rows=None):
    """Logits by sequence [tokens, V], of forwards with these counts of rows."""
    batch = batch or Batch(len(schedule[0]))
    runner = ModelRunner(loaded, len(schedule[0]), KV_SLOTS)
    runner.packed = packed
    logits = [[] for _ in schedule[0]]
    for counts in schedule:
        arguments = batch.rows(counts, width)
        asked = live_rows(arguments[2])
        found = runner.forward(*arguments, asked)
        assert runner.rows >= sum(counts) and (packed or runner.rows == arguments[0].numel())
        for b, part in enumerate(found.split(counts)):
            logits[b].append(part)
    return [torch.cat(parts) for parts in logits]


SCHEDULES = {
    "ragged": [[8, 4, 0], [4, 4, 8], [0, 8, 4]],
    "all alike": [[8, 8, 8], [4, 4, 4]],
    "alone": [[8], [4], [8]],
    "odd": [[4, 0, 8], [4, 4, 4], [4, 8, 4]],
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@KINDS
@each_schedule
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "plain"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "static"])
def test_decoding_block_by_block_equals_one_forward(moe, schedule, deterministic, packed):
    loaded, batch = load(moe, deterministic), Batch(len(schedule[0]))
    found = decode(loaded, schedule, 8 if schedule == SCHEDULES["all alike"] else 11, packed, batch)
    for b, logits in enumerate(found):
        with torch.no_grad():
            whole = loaded.model(batch.tokens[b : b + 1, : batch.done[b]]).logits[0]
        torch.testing.assert_close(logits, whole, atol=1e-5, rtol=0)


@KINDS
@each_schedule
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_packed_and_static_rows_have_the_same_bits(moe, schedule, dtype):
    loaded = load(moe, dtype=dtype)
    static = decode(loaded, schedule, 11, packed=False)
    for width in (8, 11, 16):
        for found, expected in zip(decode(loaded, schedule, width, packed=True), static, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "static"])
def test_spare_logits_rows_may_point_anywhere(packed):
    runner, arguments = ModelRunner(load(), 3, KV_SLOTS), Batch(3).rows([4, 8, 0], 11)
    runner.packed = packed
    live = live_rows(arguments[2])
    expected = runner.forward(*arguments, live)
    spare = torch.cat([live, torch.tensor([0, 10, 32, 0])])
    assert torch.equal(runner.forward(*arguments, spare)[: len(live)], expected)
    if packed:
        assert torch.equal(runner.forward(*arguments, spare, len(live)), expected)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "static"])
def test_memory_that_holds_no_keys_and_values_is_not_looked_at(packed):
    expected = decode(load(), [[8, 4], [4, 0], [4, 4]], 8, packed)
    runner, batch = ModelRunner(load(), 2, KV_SLOTS, packed=packed), Batch(2)
    for values in (runner.cache.keys, runner.cache.values):
        values.fill_(torch.nan)
    found = [[], []]
    for counts in ([8, 4], [4, 0], [4, 4]):
        arguments = batch.rows(counts, 8)
        logits = runner.forward(*arguments, live_rows(arguments[2])).split(counts)
        found = [[*mine, new] for mine, new in zip(found, logits, strict=True)]
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(torch.cat(mine), theirs)


@pytest.mark.parametrize("position", [7, -1, 10**6])
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "plain"])
def test_a_batch_without_live_rows_changes_nothing(deterministic, position):
    runner, arguments = ModelRunner(load(deterministic=deterministic), 2, KV_SLOTS), Batch(2).rows([0, 0], 6)
    arguments[1].fill_(position)
    assert runner.forward(*arguments, torch.tensor([0, 3])).shape == (2, VOCABULARY)
    assert runner.rows <= 4
    assert not runner.cache.keys.any()


def test_without_logits_rows_keys_and_values_are_stored_all_the_same():
    batch, runner = Batch(2), ModelRunner(load(), 2, KV_SLOTS)
    assert runner.forward(*batch.rows([8, 4], 8), None) is None
    expected = decode(load(), [[8, 4], [4, 4]], 8, packed=True, batch=Batch(2))
    arguments = batch.rows([4, 4], 8)
    found = runner.forward(*arguments, live_rows(arguments[2]))
    assert torch.equal(found, torch.cat([expected[0][8:], expected[1][4:]]))


def test_plain_rows_come_in_multiples_of_four():
    runner, arguments = ModelRunner(load(deterministic=False), 3, KV_SLOTS), Batch(3).rows([4, 1, 0], 5)
    assert runner.forward(*arguments, live_rows(arguments[2])).shape == (5, VOCABULARY)
    assert runner.rows == 8


def test_angles_from_the_table_are_transformers_own_bit_for_bit():
    for dtype in ("float32", "bfloat16", "float16"):
        loaded = load(dtype=dtype)
        runner = ModelRunner(loaded, 1, 2000)
        positions = torch.randint(0, 2000, (3, 17), generator=torch.Generator().manual_seed(0))
        expected = loaded.model.model.rotary_emb(torch.empty(0, dtype=runner.dtype), positions)
        for found, wanted in zip(runner._rope(layers_of(loaded.model), positions), expected, strict=True):
            assert torch.equal(found, wanted)


def test_a_runner_knows_when_a_graph_of_its_last_forward_is_out_of_date():
    runner, batch = ModelRunner(load(), 1, KV_SLOTS), Batch(1)
    runner.forward(*batch.rows([4], 4), None)
    assert runner.is_current()
    layer = runner.model.model.model.layers[0]
    for change in (
        lambda: setattr(layer.self_attn.v_proj.weight, "data", torch.ones(32, 32)),
        lambda: setattr(layer, "mlp", copy.deepcopy(layer.mlp)),
        lambda: layer.register_forward_hook(lambda *_: None),
    ):
        change()
        assert not runner.is_current()
        runner.forward(*batch.rows([4], 4), None)
        assert runner.is_current()
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(2)
    assert runner.is_current()


def test_a_model_that_was_cast_since_is_refused():
    runner = ModelRunner(load(), 1, KV_SLOTS)
    runner.model.model.to(torch.bfloat16)
    with pytest.raises(SimsdError, match="is now torch.bfloat16 on cpu, its runner was made for torch.float32 on cpu"):
        runner.forward(*Batch(1).rows([4], 4), torch.tensor([0]))


def test_a_runner_follows_angles_that_change():
    loaded = load()
    runner, arguments = ModelRunner(loaded, 1, KV_SLOTS), Batch(1).rows([8], 8)
    before = runner.forward(*arguments, torch.arange(8))
    loaded.model.model.rotary_emb.inv_freq = loaded.model.model.rotary_emb.inv_freq * 0.5
    found = runner.forward(*arguments, torch.arange(8))
    assert not torch.equal(found, before)
    assert torch.equal(found, ModelRunner(loaded, 1, KV_SLOTS).forward(*arguments, torch.arange(8)))


def scattered_table(sequences: int, width: int, pages: int) -> torch.Tensor:
    """int32 [B, width] pages in random order, some of no sequence's left over."""
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(3))[: sequences * width]
    return order.view(sequences, width).to(torch.int32)


@KINDS
@pytest.mark.parametrize("stock", [False, True], ids=["fused", "stock"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "static"])
def test_pages_give_the_bits_of_places_side_by_side(packed, stock, moe):
    loaded, schedule = load(moe), [[8, 4, 12], [4, 4, 4], [4, 0, 8], [0, 0, 4], [4, 4, 4]]
    layers = StockLayers if stock else layers_of
    table = scattered_table(3, 3, 11)  # KV_SLOTS: three pages of 16
    runners = [
        ModelRunner(loaded, 3, KV_SLOTS, packed=packed, layers=layers, **paged)
        for paged in ({}, {"block_table": BlockTable(table, 16), "pages": 11})
    ]
    for values in (runners[1].cache.keys, runners[1].cache.values):
        values.fill_(torch.nan)
    batch = Batch(3)
    for counts in schedule:
        arguments = batch.rows(counts, 12)
        wanted, found = (runner.forward(*arguments, live_rows(arguments[2])) for runner in runners)
        assert torch.equal(found, wanted)
        assert runners[0].rows == runners[1].rows


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "static"])
def test_a_table_may_change_between_forwards_and_name_a_page_twice(packed):
    """Two sequences with the same beginning read it from one page, which only the first has written."""
    loaded, table = load(), BlockTable(torch.tensor([[2, 0, -1], [2, 1, -1]], dtype=torch.int32), 16)
    contiguous = ModelRunner(loaded, 2, KV_SLOTS, packed=packed)
    paged = ModelRunner(loaded, 2, KV_SLOTS, packed=packed, block_table=table, pages=4)
    batches = Batch(2), Batch(2)
    for batch in batches:
        batch.tokens[1] = batch.tokens[0]
    contiguous.forward(*batches[0].rows([16, 16], 16), None)
    paged.forward(*batches[1].rows([16, 0], 16), None)
    batches[1].done[1] = 16
    for counts in ([4, 8], [8, 4]):
        arguments, shared = (batch.rows(counts, 8) for batch in batches)
        wanted = contiguous.forward(*arguments, live_rows(arguments[2]))
        assert torch.equal(paged.forward(*shared, live_rows(shared[2])), wanted)
    table.set([(0, 2, [3])])
    arguments, shared = (batch.rows([4, 0], 4) for batch in batches)
    wanted = contiguous.forward(*arguments, live_rows(arguments[2]))
    assert torch.equal(paged.forward(*shared, live_rows(shared[2])), wanted)


def test_what_has_no_page_is_not_stored():
    table = BlockTable(torch.tensor([[1, -1, -1], [0, -1, -1]], dtype=torch.int32), 16)
    runner, batch = ModelRunner(load(), 2, KV_SLOTS, block_table=table, pages=3), Batch(2)
    runner.forward(*batch.rows([16, 16], 16), None)
    stored = runner.cache.keys.clone()
    assert stored[:, :2].any() and not stored[:, 2].any()
    runner.forward(*batch.rows([4, 4], 4), None)
    assert torch.equal(runner.cache.keys, stored)
