"""BlockCache: decoding through slots gives the logits of a whole forward."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import simsd
from simsd import SimsdError
from simsd.models.cache import CACHE_ARGUMENT, BlockCache
from simsd.models.runner import ModelRunner
from simsd_kernels import INF, dispatch
from small_checkpoints import BASE, MASK_ID, VOCABULARY, stock_model

BLOCK = 4


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def model(request):
    return simsd.load(stock_model(request.param), mask_token_id=MASK_ID, block_length=BLOCK)


def runner_of(model: simsd.LoadedModel, capacity: int) -> ModelRunner:
    return ModelRunner(model, 2, capacity, scratch=capacity)


def run(runner: ModelRunner, tokens, positions, clock, birth, death, slots):
    """Logits [2, R, V] of all rows."""
    every = torch.arange(tokens.numel())
    return runner.forward(tokens, positions, slots, clock, birth, death, every).view(*tokens.shape, -1)


def whole(model: simsd.LoadedModel, tokens):
    with torch.no_grad():
        return model.model(tokens).logits


@pytest.fixture
def tokens():
    return torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(2))


def clean(slots: torch.Tensor, keys: int):
    """positions, clock, birth, death of clean rows at slot = position, all slots up to the last one live."""
    position = torch.arange(keys, dtype=torch.int32).expand(slots.shape[0], -1)
    birth = (position // BLOCK).masked_fill(position > slots.max(), INF)
    return slots.long(), slots // BLOCK, birth, torch.full_like(birth, INF)


def test_decoding_block_by_block_equals_one_forward(model, tokens):
    runner, parts = runner_of(model, 24), []
    for start, end in ((0, 8), (8, 12), (12, 14)):
        slots = torch.arange(start, end, dtype=torch.int32).repeat(2, 1)
        parts.append(run(runner, tokens[:, start:end], *clean(slots, 24), slots))
    torch.testing.assert_close(torch.cat(parts, 1), whole(model, tokens), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("error")
def test_a_forward_calls_the_cache_what_the_installed_transformers_does(model, tokens):
    slots = torch.arange(14, dtype=torch.int32).repeat(2, 1)
    logits = run(runner_of(model, 16), tokens, *clean(slots, 16), slots)
    with torch.no_grad():
        cached = model.model(tokens, past_key_values=DynamicCache(config=model.config)).logits
    torch.testing.assert_close(logits, cached, atol=1e-5, rtol=0)


def test_slots_may_lie_anywhere_and_each_sequence_has_its_own(model, tokens):
    runner = runner_of(model, 40)
    order = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i))[:14] for i in range(2)]).int()
    position = torch.arange(14, dtype=torch.int32).expand(2, -1)
    birth = torch.full((2, 40), INF, dtype=torch.int32)
    death = torch.full_like(birth, INF)
    parts = []
    for start, end in ((0, 4), (4, 12), (12, 14)):
        here = slice(start, end)
        birth.scatter_(1, order[:, here].long(), position[:, here] // BLOCK)
        rows = (tokens[:, here], position[:, here], position[:, here] // BLOCK, birth, death)
        parts.append(run(runner, *rows, order[:, here].contiguous()))
    torch.testing.assert_close(torch.cat(parts, 1), whole(model, tokens), atol=1e-5, rtol=0)


def test_garbage_in_dead_slots_reaches_nothing(model, tokens):
    runner = runner_of(model, 24)
    runner.cache.keys.fill_(torch.nan)
    runner.cache.values.fill_(torch.inf)
    slots = torch.arange(14, dtype=torch.int32).repeat(2, 1)
    logits = run(runner, tokens, *clean(slots, 24), slots)
    torch.testing.assert_close(logits, whole(model, tokens), atol=1e-5, rtol=0)


def test_the_causal_lm_forward_takes_a_block_cache(model, tokens):
    model = model.model
    cache = BlockCache(model.config, batch_size=2, capacity=16)
    slots = torch.arange(14, dtype=torch.int32).repeat(2, 1)
    cache.prepare(slots)
    position, clock, birth, death = clean(slots, 16)
    clocks = {"clock": clock, "birth": birth, "death": death}
    with torch.no_grad():
        for mask in (None, {"full_attention": None}, torch.ones(2, 14)):
            logits = model(tokens, attention_mask=mask, position_ids=position, past_key_values=cache, **clocks).logits
            torch.testing.assert_close(logits, model(tokens).logits, atol=1e-5, rtol=0)
        with pytest.raises(SimsdError, match="a BlockCache needs position_ids, clock, birth, death"):
            model(tokens, past_key_values=cache)


def test_a_compiled_forward_sees_each_call_s_slots(model, tokens):
    model = model.model
    if hasattr(model.config, "num_experts"):
        pytest.skip("the experts' loop depends on data")
    cache = BlockCache(model.config, batch_size=2, capacity=16)
    compiled = torch.compile(model.model, backend="eager", fullgraph=True)
    parts = []
    with torch.no_grad():
        for start in (0, 4, 8):
            slots = torch.arange(start, start + 4, dtype=torch.int32).repeat(2, 1)
            position, clock, birth, death = clean(slots, 16)
            cache.prepare(slots)
            here = tokens[:, start : start + 4]
            arguments = {"clock": clock, "birth": birth, "death": death, CACHE_ARGUMENT: cache}
            out = compiled(here, attention_mask={"full_attention": None}, position_ids=position, **arguments)
            parts.append(model.lm_head(out.last_hidden_state))
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens[:, :12]).logits, atol=1e-5, rtol=0)


def config():
    return simsd.models.families.sdar.SDARConfig(**BASE)


def test_update_stores_a_layer_and_returns_views_of_its_slots():
    cache = BlockCache(config(), batch_size=2, capacity=16)
    cache.prepare(torch.arange(3, dtype=torch.int32).repeat(2, 1))
    k, v = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 3, 16)
    keys, values = cache.update(k, v, 1)
    assert keys.shape == values.shape == (2, 2, 16, 16)
    assert keys.data_ptr() == cache.keys[1].data_ptr()
    assert torch.equal(keys[:, :, :3], k) and torch.equal(values[:, :, :3], v)
    assert not cache.keys[0].any() and not cache.keys[1, :, :, 3:].any()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_room_that_nobody_uses_takes_no_memory():
    before = resident_bytes()
    cache = BlockCache(config(), batch_size=1, capacity=2**20)
    assert cache.keys.nbytes == cache.values.nbytes == 2**28 and resident_bytes() - before < 2**26
    assert not cache.keys[0, 0, :, -8:].any() and not cache.values[-1, 0, :, :8].any()
    cache.prepare(torch.tensor([[2**20 - 1]], dtype=torch.int32))
    keys, _ = cache.update(torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16), 1)
    assert keys[0, :, -1].all() and not keys[0, :, -9:-1].any()


def test_more_room_than_there_can_be_is_refused_with_its_size():
    with pytest.raises(
        MemoryError, match=r"^288,230,376,151,711,744 bytes for keys or values: Cannot allocate memory$"
    ):
        BlockCache(config(), batch_size=2**20, capacity=2**30)


@pytest.mark.parametrize(
    "slots",
    [torch.zeros(2, 3), torch.zeros(3, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int32)],
    ids=["dtype", "dimension", "batch"],
)
def test_wrong_slots_are_refused(slots):
    with pytest.raises(SimsdError, match=r"slots must be int32 \[2, rows\], got torch\."):
        BlockCache(config(), batch_size=2, capacity=4).prepare(slots)


def test_misuse_is_refused():
    cache = BlockCache(config(), batch_size=2, capacity=4)
    k = torch.randn(2, 2, 1, 16)
    with pytest.raises(SimsdError, match="call prepare"):
        cache.update(k, k, 0)
    with pytest.raises(SimsdError, match="no crop"):
        cache.crop(-1)
    cache.prepare(torch.zeros(2, 1, dtype=torch.int32))
    with pytest.raises(SimsdError, match="carries no gradients"):
        cache.update(k.requires_grad_(), k, 0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_simsd_backend_is_honoured_by_a_runner(model, tokens, backend, monkeypatch):
    if obstacle := dispatch.device_obstacle(backend, "masked_attention", torch.device("cpu")):
        pytest.skip(obstacle)
    slots = torch.arange(14, dtype=torch.int32).repeat(2, 1)
    expected = run(runner_of(model, 16), tokens, *clean(slots, 16), slots)
    monkeypatch.setenv("SIMSD_BACKEND", backend)
    logits = run(runner_of(model, 16), tokens, *clean(slots, 16), slots)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    monkeypatch.setenv("SIMSD_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot serve"):
        run(runner_of(model, 16), tokens, *clean(slots, 16), slots)
