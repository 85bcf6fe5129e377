"""benchmarks/cpu/trace_iteration.py: an iteration is fit for a CUDA graph, and its launches are few."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch

from benchmarks.cpu import trace_iteration as tracing
from simsd.decode import iteration
from simsd.decode.iteration import Shape
from simsd.decode.temporal import Temporal


@pytest.mark.parametrize(("noise", "most"), [(False, 1150), (True, 1200)], ids=["greedy", "noise"])
def test_an_iteration_of_sdar_8b_launches_few_kernels(noise, most):
    launches = tracing.trace("8B", "1.7B", tracing.exact_shape(1, 4, 2, 16, noise))
    assert not launches.uploads
    layers = 36 + 2 * 28
    # Fewer would mean that a layer, or the loop, was not looked into.
    assert 8 * layers < launches.kernels <= most
    assert {"propose", "draft forward", "plan", "forward", "verify", "advance"} <= {c.part for c in launches.calls}


@pytest.mark.parametrize(("target", "most"), [("8B", 11), ("30B-A3B", 20)], ids=["dense", "experts"])
def test_a_layer_launches_few_kernels(target, most):
    assert 8 <= tracing.per_layer(target, batch=1, block_length=4, states=16) <= most


def test_one_plan_of_the_mask_serves_all_layers_of_a_forward():
    calls = tracing.trace("8B", "1.7B", tracing.exact_shape(1, 4, 2, 16), layers=3).calls
    found = collections.Counter((c.part, c.op) for c in calls)
    for part, forwards in (("draft forward", 2), ("forward", 1)):
        assert found[part, "simsd::attention_plan"] == forwards
        assert found[part, "simsd::masked_attention"] == 3 * forwards


def exact(**changes) -> Shape:
    """Two drafted blocks of 4 tokens and 16 states for each of 3 slots."""
    common = {"lookahead": 2, "states": 16, "logits_rows": 3 * 16 * 4, "draft_blocks": 2, "keeps_logits": True}
    return Shape(**common | changes)


def temporal(accept: str, rejected_tail: str, **changes) -> Shape:
    judged = Temporal(accept, rejected_tail, gates=True)
    return Shape(lookahead=1, draft_steps=4, temporal=judged, filters=(True, True), noise=True, **changes)


SHAPES = {
    "native": Shape(states=1, logits_rows=12),
    "native with noise": Shape(states=1, logits_rows=12, noise=True, filters=(True, True)),
    "a proposal that stands": exact(draft_blocks=0),
    "the target drafts": exact(draft_blocks=0, self_draft=True),
    "the target drafts with noise": exact(draft_blocks=0, self_draft=True, noise=True),
    "the text drafts": exact(draft_blocks=0, lookup=True),
    "the text and the target draft with noise": exact(draft_blocks=0, lookup=True, self_draft=True, noise=True),
    "both draft, filtered": exact(self_draft=True, noise=True, filters=(True, True)),
    "two forwards a block": exact(draft_steps=2),
    "two forwards a block with noise": exact(draft_steps=2, noise=True, filters=(True, False)),
    "long prompts come along": exact(pending=4, draft_pending=5),
    "temporal match": temporal("match", "truncate"),
    "temporal mrs": temporal("mrs", "truncate_no_bonus"),
    "temporal, target's tail": temporal("match", "target_argmax_all"),
    "temporal, draft's tail": temporal("match", "draft_argmax"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_no_iteration_reads_or_uploads(name):
    """`trace` raises where the host reads."""
    launches = tracing.trace("1.7B", "1.7B", SHAPES[name], batch=3, layers=1)
    assert launches.calls and not launches.uploads


def test_blocks_of_64_tokens_and_experts_are_no_exception():
    shape = tracing.exact_shape(2, 64, 1, 3, noise=True)
    launches = tracing.trace("30B-A3B", "1.7B", shape, batch=2, block_length=64, layers=1)
    assert launches.calls and not launches.uploads


READS = {
    "a truth value": lambda x: 1 if x.any() else 0,
    "item": lambda x: x.sum().item(),
    "a mask as index": lambda x: x[x > 0],
    "a masked place": lambda x: x.__setitem__(x > 0, torch.ones(3, device=x.device)),
    "nonzero": lambda x: x.nonzero(),
    "to the host": lambda x: x.cpu(),
    "a copy on the host": lambda x: torch.empty(x.shape).copy_(x),
    "equal": lambda x: torch.equal(x, x + 1),
    "a repeat of unknown length": lambda x: x.flatten().repeat_interleave(x.flatten().long()),
    "a list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("name", READS)
def test_what_waits_for_the_device_is_found(name):
    with tracing.without_a_gpu():
        x = torch.ones(4, 4, device=tracing.DEVICE)
        with pytest.raises(tracing.HostRead), tracing.counted():
            READS[name](x)


UPLOADS = {
    "a list": lambda x: torch.tensor([1, 2], device=x.device),
    "as_tensor": lambda x: torch.as_tensor([1.0], device=x.device),
    "a tensor of the host": lambda x: torch.zeros(3).to(x.device),
    "a copy": lambda x: x.copy_(torch.zeros(4, 4)),
    "a scalar's copy": lambda x: x[0, :1].copy_(torch.tensor(2.0)),
    "an element": lambda x: x.__setitem__((0, 0), 5.0),
    "an index of the host": lambda x: x[torch.tensor([1, 0])],
    "a list as index": lambda x: x[[1, 0]],
}


@pytest.mark.parametrize("name", UPLOADS)
def test_what_the_host_sends_is_found(name):
    with tracing.without_a_gpu():
        x = torch.ones(4, 4, device=tracing.DEVICE)
        with tracing.counted() as launches:
            UPLOADS[name](x)
    assert len(launches.uploads) == 1, launches.uploads


COUNTS = {
    "views": (0, lambda x: x[1:, None].transpose(0, 1).reshape(-1, 4).unflatten(1, (2, 2)).expand(3, 2, 2)[..., 0]),
    "memory": (0, lambda x: torch.empty_like(x)),
    "arange": (1, lambda x: torch.arange(4, device=x.device)),
    "a scalar": (1, lambda x: x + 1),
    "where with a number": (3, lambda x: torch.where(x > 0, x, -1)),  # the number becomes a tensor
    "a product": (1, lambda x: torch.nn.functional.linear(x, x)),
    "a copying flatten": (1, lambda x: x.t().flatten()),
    "a column": (1, lambda x: x.__setitem__((slice(None), 1), x[:, 2])),
    "a region": (1, lambda x: x.__setitem__((slice(None), slice(1, 3)), 0.0)),
    "rows": (1, lambda x: x[torch.empty(2, dtype=torch.int64, device=x.device)]),
    "top-k": (2, lambda x: x.topk(2)),
    "in place": (2, lambda x: x.add_(1).clamp_(min=0)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_launches_are_those_of_torch_on_cuda(name):
    kernels, function = COUNTS[name]
    with tracing.without_a_gpu():
        x = torch.ones(4, 4, device=tracing.DEVICE)
        with tracing.counted() as launches:
            function(x)
    assert launches.kernels == kernels, launches.calls
    assert not launches.uploads


def test_an_offence_comes_with_its_place(monkeypatch):
    def peek(*arguments):
        return iteration.run_plan(*arguments) if arguments[2].start.sum() > 0 else None

    parts = dataclasses.replace(iteration.PARTS, forward=peek)
    monkeypatch.setattr(tracing, "iterate", lambda *arguments: iteration.iterate(*arguments, parts))
    with pytest.raises(tracing.HostRead, match=r"python/simsd/decode/iteration.py:\d+: aten::_local_scalar_dense"):
        tracing.trace("1.7B", None, SHAPES["native"], batch=3, layers=1)
