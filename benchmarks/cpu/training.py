"""A training step of tiny-target by interval attention and by scaled_dot_product_attention with a dense mask, and both
attentions alone, forward and backward, at longer lengths.

The step is the recipe's own (examples/tiny_pair), in one thread: what differs is the attention, and the dense mask that
is made for each batch. Contestants take turns in one process and must have the same gradients, to rounding.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn.functional import scaled_dot_product_attention

from simsd.models.folders import PAIR
from simsd_kernels import Visibility, masked_attention

from ..contest import Bench
from ..environment import ROOT
from ..report import Table, spread
from ..timing import measure
from .attention_cpu import milliseconds

sys.path.insert(0, str(ROOT / "examples" / "tiny_pair"))
import train  # noqa: E402
from batches import Batch, Encoder, training_batches  # noqa: E402
from forward import batch_loss, dense_mask, interval_attention  # noqa: E402

sys.path.pop(0)

HEADS, KV_HEADS, DIM, BLOCK = 8, 4, 64, 4  # of attention alone
COLUMNS = [
    ("simsd ms", spread("simsd_ms")),
    ("sdpa ms", spread("sdpa_ms")),
    ("ratio", "{ratio:.2f}"),
    ("ratio of best", "{ratio_of_best:.2f}"),
]
STEP = Table([("of a step", "{part}"), *COLUMNS], "A training step of the recipe:")
ALONE = Table(
    [("tokens", "{tokens}"), ("mask", "{mask}"), *COLUMNS],
    f"Attention alone, forward and backward, float32, {HEADS} query and {KV_HEADS} key/value heads of {DIM}:",
)


def dense_attention(batch: Batch) -> Callable:
    """As `interval_attention`, by torch's attention, whose key/value heads are repeated."""
    return by_torch(dense_mask(batch))


def by_torch(mask: torch.Tensor) -> Callable:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attend


def training_calls(items: int) -> tuple[dict[str, dict[str, Callable]], str]:
    """What to time, by what it is of and by contestant, all from the shipped weights and on the same batches; and the
    batches' rows."""
    folder = PAIR / "tiny-target"
    encoder = Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
    draws = random.Random(0), np.random.default_rng(0)
    batches = training_batches(encoder, train.MIXTURE, items, train.PARTS_PER_STEP, *draws)
    calls: dict[str, dict[str, Callable]] = {"forward and backward": {}, "and optimizers": {}}
    for name, attention in {"simsd": interval_attention, "sdpa": dense_attention}.items():
        model = train.build_model("target", encoder)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        optimizers = train.build_optimizers(model)
        calls["forward and backward"][name] = partial(gradients, model, attention, batches)
        calls["and optimizers"][name] = partial(step, model, attention, batches, optimizers)
    return calls, ", ".join(" x ".join(map(str, batch.tokens.shape)) for batch in batches)


def gradients(model: torch.nn.Module, attention: Callable, batches: list[Batch]) -> list[torch.Tensor]:
    """Of the mean loss over all masked rows, as the recipe has it."""
    rows = sum(len(batch.targets) for batch in batches)
    parameters = list(model.parameters())
    parts = [torch.autograd.grad(batch_loss(model, one, attention=attention) / rows, parameters) for one in batches]
    return [torch.stack(found).sum(0) for found in zip(*parts, strict=True)]


def step(model: torch.nn.Module, attention: Callable, batches: list[Batch], optimizers: list) -> None:
    for parameter, gradient in zip(model.parameters(), gradients(model, attention, batches), strict=True):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


def alone(visibility: Visibility) -> dict[str, Callable]:
    """Forward and backward by both, the same mask and inputs."""
    generator = torch.Generator().manual_seed(0)
    rows = visibility.clock.numel()
    q, k, v = (torch.randn(1, heads, rows, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
    dout = torch.randn(q.shape, generator=generator)
    vectors = [vector[None] for vector in (visibility.clock, visibility.birth, visibility.death)]
    dense = visibility.dense()

    def call(attend: Callable) -> tuple:
        inputs = [x.requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attend(*inputs), inputs, dout)

    intervals = lambda q, k, v: masked_attention(q, k, v, *vectors)  # noqa: E731
    return {"simsd": partial(call, intervals), "sdpa": partial(call, by_torch(dense))}


def agree(calls: dict[str, Callable], tolerance: float) -> None:
    """`tolerance`: of all gradients' difference, relative to their norm."""
    ours, theirs = (torch.cat([x.flatten() for x in calls[name]()]) for name in ("simsd", "sdpa"))
    if not (ours - theirs).norm() <= tolerance * theirs.norm():
        raise RuntimeError("the gradients differ: this is no measurement")


def figures(bench: Bench, calls: dict[str, Callable], seconds: float) -> dict:
    taken = measure({name: [call] for name, call in calls.items()}, bench.device, seconds, least=2 if bench.tiny else 8)
    ours, theirs = taken["simsd"], taken["sdpa"]
    ratios = {"ratio": theirs.us / ours.us, "ratio_of_best": theirs.best_us / ours.best_us}
    return {**{f"{name}_ms": milliseconds(one) for name, one in taken.items()}, **ratios, "rounds": ours.samples}


def run(bench: Bench, seconds: float, items: int, tokens: list[int]) -> None:
    """`seconds`: of measuring per case; `items`: of a step; `tokens`: of attention alone, each noisy and clean."""
    parts, rows = training_calls(items)
    agree(parts["forward and backward"], 0.02)  # products in bfloat16
    for part, calls in parts.items():
        bench.row(STEP, part=part, rows=rows, **figures(bench, calls, seconds))
    bench.note(f"The step's batches: {rows} rows, clean and noisy, padding included.")
    for count in tokens:
        masks = {
            "noisy and clean": Visibility.training(count, BLOCK),
            "window of 64": Visibility.sliding_window(2 * count, 64),
        }
        for name, visibility in masks.items():
            calls = alone(visibility)
            agree(calls, 1e-4)
            bench.row(ALONE, tokens=count, mask=name, **figures(bench, calls, seconds))
