"""BlockCache and `forward.run`: decoding through slots gives the logits of a whole forward."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import simsd
from simsd import SimsdError
from simsd.models.cache import CACHE_ARGUMENT, BlockCache
from simsd.models.forward import run
from simsd_kernels import INF, dispatch
from small_checkpoints import BASE, MASK_ID, VOCABULARY, stock_model

BLOCK = 4


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def model(request):
    return simsd.load(stock_model(request.param), mask_token_id=MASK_ID, block_length=BLOCK).model


@pytest.fixture
def tokens():
    return torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(2))


def clean(slots: torch.Tensor, keys: int):
    """positions, clock, birth, death of clean rows at slot = position, all slots up to the last one live."""
    position = torch.arange(keys, dtype=torch.int32).expand(slots.shape[0], -1)
    birth = (position // BLOCK).masked_fill(position > slots.max(), INF)
    return slots.long(), slots // BLOCK, birth, torch.full_like(birth, INF)


@pytest.mark.parametrize("limit", [None, 16])
def test_decoding_block_by_block_equals_one_forward(model, tokens, limit):
    cache = BlockCache(model.config, batch_size=2, capacity=24)
    cache.limit = limit
    parts = []
    for start, end in ((0, 8), (8, 12), (12, 14)):
        slots = torch.arange(start, end, dtype=torch.int32).expand(2, -1)
        rows = clean(slots, limit or 24)
        parts.append(run(model, tokens[:, start:end], *rows, cache, slots))
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("error")
def test_a_forward_calls_the_cache_what_the_installed_transformers_does(model, tokens):
    slots = torch.arange(14, dtype=torch.int32).repeat(2, 1)
    logits = run(model, tokens, *clean(slots, 16), BlockCache(model.config, 2, 16), slots)
    with torch.no_grad():
        cached = model(tokens, past_key_values=DynamicCache(config=model.config)).logits
    torch.testing.assert_close(logits, cached, atol=1e-5, rtol=0)


def test_slots_may_lie_anywhere_and_each_sequence_has_its_own(model, tokens):
    cache = BlockCache(model.config, batch_size=2, capacity=40)
    order = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i))[:14] for i in range(2)]).int()
    position = torch.arange(14, dtype=torch.int32).expand(2, -1)
    birth = torch.full((2, 40), INF, dtype=torch.int32)
    death = torch.full_like(birth, INF)
    parts = []
    for start, end in ((0, 4), (4, 12), (12, 14)):
        here = slice(start, end)
        birth.scatter_(1, order[:, here].long(), position[:, here] // BLOCK)
        rows = (tokens[:, here], position[:, here], position[:, here] // BLOCK, birth, death)
        parts.append(run(model, *rows, cache, order[:, here].contiguous()))
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens).logits, atol=1e-5, rtol=0)


def test_rows_with_slot_minus_one_are_not_stored(model, tokens):
    cache = BlockCache(model.config, batch_size=2, capacity=24)
    slots = torch.arange(8, dtype=torch.int32).repeat(2, 1)
    run(model, tokens[:, :8], *clean(slots, 24), cache, slots)
    before = cache.keys.clone()
    run(model, tokens[:, 8:12], *clean(slots[:, 4:] + 4, 24), cache, torch.full((2, 4), -1, dtype=torch.int32))
    assert torch.equal(cache.keys, before)


def test_garbage_in_dead_slots_reaches_nothing(model, tokens):
    cache = BlockCache(model.config, batch_size=2, capacity=24)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.inf)
    slots = torch.arange(14, dtype=torch.int32).repeat(2, 1)
    logits = run(model, tokens, *clean(slots, 24), cache, slots)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(tokens).logits, atol=1e-5, rtol=0)


def test_logits_are_computed_for_the_wanted_rows_alone(model, tokens):
    slots = torch.arange(14, dtype=torch.int32).repeat(2, 1)

    def logits(rows):
        return run(model, tokens, *clean(slots, 16), BlockCache(model.config, 2, 16), slots, rows)

    wanted = torch.tensor([12, 3])
    torch.testing.assert_close(logits(wanted), logits(None)[:, wanted], atol=1e-6, rtol=0)
    assert logits(torch.empty(0, dtype=torch.int64)) is None


def test_the_causal_lm_forward_takes_a_block_cache(model, tokens):
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
    return simsd.models.sdar.SDARConfig(**BASE)


def test_limit_returns_views_of_the_preallocated_slots():
    cache = BlockCache(config(), batch_size=2, capacity=16)
    cache.prepare(torch.arange(3, dtype=torch.int32).repeat(2, 1))
    k, v = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 3, 16)
    cache.limit = 8
    keys, values = cache.update(k, v, 1)
    assert keys.shape == values.shape == (2, 2, 8, 16)
    assert keys.data_ptr() == cache.keys[1].data_ptr()
    assert torch.equal(keys[:, :, :3], k) and torch.equal(values[:, :, :3], v)
    assert not cache.keys[0].any() and not cache.keys[1, :, :, 3:].any()


def test_select_keeps_the_sequences_that_go_on():
    cache = BlockCache(config(), batch_size=3, capacity=4)
    cache.keys.copy_(torch.arange(3.0)[None, :, None, None, None].expand_as(cache.keys))
    cache.select(torch.tensor([2, 0]))
    assert cache.batch_size == 2 and cache.keys[0, :, 0, 0, 0].tolist() == [2, 0]
    cache.reset()
    assert not cache.keys.any()


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
    with pytest.raises(SimsdError, match="between 0 and its capacity 4, got 5"):
        cache.limit = 5
    with pytest.raises(SimsdError, match="no crop"):
        cache.crop(-1)
    cache.prepare(torch.zeros(2, 1, dtype=torch.int32))
    with pytest.raises(SimsdError, match="carries no gradients"):
        cache.update(k.requires_grad_(), k, 0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_simsd_backend_is_honoured_by_run(model, tokens, backend, monkeypatch):
    if obstacle := dispatch.device_obstacle(backend, "masked_attention", torch.device("cpu")):
        pytest.skip(obstacle)
    slots = torch.arange(14, dtype=torch.int32).repeat(2, 1)
    expected = run(model, tokens, *clean(slots, 16), BlockCache(model.config, 2, 16), slots)
    monkeypatch.setenv("SIMSD_BACKEND", backend)
    logits = run(model, tokens, *clean(slots, 16), BlockCache(model.config, 2, 16), slots)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    monkeypatch.setenv("SIMSD_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot serve"):
        run(model, tokens, *clean(slots, 16), BlockCache(model.config, 2, 16), slots)
