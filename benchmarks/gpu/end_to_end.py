"""Decoding with models of SDAR's shapes: native, temporal and exact at chosen acceptance rates.

Random weights, simulated acceptance: what a forward costs does not depend on the weights, what a draft is worth does,
so that is set (see replay.py). Nothing here says what a trained pair accepts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from unittest import mock

import torch
from torch import Tensor

import simsd
from simsd.benchmarking import MODES, ForwardClock
from simsd.engine import pages
from simsd.models import runner
from simsd.models.block_table import BlockTable
from simsd.models.families.sdar import SDARConfig
from simsd.models.loading import LoadedModel
from simsd.models.weights import assemble, skeleton
from simsd_kernels import masked_attention

from ..contest import Bench, alive, in_one_line
from .replay import Replay, Script, scripted

LABEL = "random weights, simulated acceptance"
MASK_ID = 151669
NEEDED_GIB = 30
COMMON = {"head_dim": 128, "vocab_size": 151936, "num_key_value_heads": 8, "mask_token_id": MASK_ID}
TARGET = COMMON | {
    "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288,
}  # fmt: skip
DRAFT = COMMON | {
    "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144,
    "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "head_dim": 16,
    "vocab_size": 300, "num_key_value_heads": 2, "mask_token_id": 299,
}  # fmt: skip
NATIVE, EXACT, TEMPORAL = "native", "exact-model", "temporal"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is decoded: `prompt` tokens, then `new` ones."""

    lengths: tuple[int, ...] = (4, 8)
    batches: tuple[int, ...] = (1, 8)
    rates: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.05)
    prompt: int = 512
    new: int = 64


def run(bench: Bench) -> None:
    plan = Plan((4,), (1, 2), (0.0, 0.3), 9, 12) if bench.tiny else Plan()
    if bench.device.type == "cuda" and (free := torch.cuda.mem_get_info()[0] / 2**30) < NEEDED_GIB:
        bench.note(f"not run: the two models and their caches need {NEEDED_GIB} GiB, {free:.0f} are free")
        return
    bench.note(LABEL)
    bench.note(
        "tok/s by wall time of all sequences together, prompts included; forwards without those of prompts alone"
    )
    began = time.perf_counter()
    target = random_model("SDAR-8B shape", TINY if bench.tiny else TARGET, bench)
    draft = random_model("SDAR-1.7B shape", TINY | {"tie_word_embeddings": True} if bench.tiny else DRAFT, bench)
    bench.sync()
    bench.note(f"both models made in {time.perf_counter() - began:.1f} s")
    forward_times(bench, plan, target, draft)
    for length in plan.lengths:
        for batch in plan.batches:
            decode_all(bench, plan, target, draft, _script(plan, length, target), length, batch)


def _script(plan: Plan, length: int, target: LoadedModel) -> Script:
    few = target.mask_token_id  # below it: never the mask token itself
    return Script.random(plan.prompt + plan.new + 8 * length, length, few, target.device)


def random_model(name: str, shape: dict, bench: Bench) -> LoadedModel:
    """Made on the device in bf16 (float32 in a rehearsal): matrices of variance 1 / fan-in, norms of ones."""
    dtype = torch.float32 if bench.tiny else torch.bfloat16
    model = skeleton(name, SDARConfig(**shape, max_position_embeddings=32768, block_length=4))
    tensors: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        made = torch.empty(value.shape, dtype=dtype, device=bench.device)
        if value.dim() > 1:
            made.normal_(0.0, value.shape[-1] ** -0.5, generator=bench.generator)
        else:
            made.fill_(1.0)
        tensors[key] = made
    loaded = simsd.load(assemble(model, tensors))
    return dataclasses.replace(loaded, name=name, end_token_ids=())


def forward_times(bench: Bench, plan: Plan, target: LoadedModel, draft: LoadedModel) -> None:
    """Wall time of a forward behind a prompt, by its number of rows: what the loop pays, launches included."""
    for rows in (4,) if bench.tiny else (4, 8, 32, 64, 128):
        case = f"forward of {rows} rows behind {plan.prompt} tokens, batch 1"
        if not bench.open(case):
            continue
        taken = [1e3 * ForwardClock(m, rows, plan.prompt + plan.new).seconds(plan.prompt) for m in (target, draft)]
        bench.add({"case": case, "cells": {"target ms": f"{taken[0]:.2f}", "draft ms": f"{taken[1]:.2f}"}, "ms": taken})


def decode_all(bench, plan: Plan, target, draft, script: Script, length: int, batch: int) -> None:
    where = f"block {length}, batch {batch}"
    settings = {"block_length": length, "max_new_tokens": plan.new, "end_token_ids": ()}
    prompts = [[(7 * i + lane) % (target.mask_token_id - 1) for i in range(plan.prompt)] for lane in range(batch)]
    runs = [(NATIVE, 0.0, False), (NATIVE, 0.0, True)]
    runs += [(mode, rate, False) for rate in plan.rates for mode in (EXACT, TEMPORAL)]
    warm: set[tuple[str, bool]] = set()
    for mode, rate, published in runs:
        name = f"{mode}{' by sdpa with a dense mask' if published else ''}"
        case = f"{name}, {where}" + ("" if mode == NATIVE else f", wrong {rate:g}")
        if not bench.open(case):
            continue
        config = simsd.GenerationConfig(**settings, **MODES[mode])

        def once(new: int, config=config, mode=mode, rate=rate) -> tuple[float, list]:
            config = dataclasses.replace(config, max_new_tokens=new)
            replay = Replay(script, rate, target.mask_token_id, target.mask_token_id)
            parts = replay.parts(forward=scripted(script))
            bench.sync()
            began = time.perf_counter()
            decoder = simsd.Decoder(
                target, prompts, None if mode == NATIVE else draft, config, parts=parts, max_batch=batch
            )
            for _ in decoder:
                pass
            bench.sync()
            return time.perf_counter() - began, decoder.results()

        try:
            with DenseAttention() if published else contextlib.nullcontext():
                if (mode, published) not in warm:
                    once(2 * length)
                    warm.add((mode, published))
                seconds, results = once(plan.new)
        except Exception as error:
            bench.add({"case": case, "cells": _cells(f"failed: {in_one_line(error)}")})
            if not alive(bench.device):
                raise
            continue
        bench.add(_row(case, seconds, results, script, plan))


HEADINGS = ("result", "acceptance", "tok/s", "target fwd/tok", "draft fwd/tok", "ms per iteration")


def _cells(*values: str) -> dict[str, str]:
    return dict(zip(HEADINGS, (*values, *[""] * (len(HEADINGS) - len(values))), strict=True))


def _row(case: str, seconds: float, results: list, script: Script, plan: Plan) -> dict:
    expected = script.tokens[plan.prompt : plan.prompt + plan.new].tolist()
    wrong = sum(result.tokens != expected for result in results)
    if wrong:
        return {"case": case, "cells": _cells(f"WRONG: {wrong} of {len(results)} texts are not the script")}
    stats = [result.stats for result in results]
    total = sum(stats[1:], stats[0])
    iterations = max(s.target_forwards for s in stats)
    figures = {
        "acceptance": total.acceptance,
        "tokens_per_second": total.new_tokens / seconds,
        "target_forwards_per_token": total.target_forwards / total.new_tokens,
        "draft_forwards_per_token": total.draft_forwards / total.new_tokens,
        "ms_per_iteration": 1e3 * seconds / max(iterations, 1),
    }
    share = "" if total.acceptance is None else f"{100 * total.acceptance:.1f} %"
    numbers = (figures[k] for k in ("tokens_per_second", "target_forwards_per_token", "draft_forwards_per_token"))
    cells = _cells("as scripted", share, *(f"{x:.3g}" for x in numbers), f"{figures['ms_per_iteration']:.2f}")
    return {"case": case, "cells": cells, "figures": figures}


class DenseAttention:
    """While it is entered, decoders that are made attend by sdpa with a dense mask, built once a forward, and their
    keys and values lie side by side: the published path."""

    def __enter__(self) -> None:
        self.seen = None
        self.patches = contextlib.ExitStack()
        self.patches.enter_context(mock.patch.object(runner, "unchecked", self.instead))
        self.patches.enter_context(mock.patch.object(pages, "ModelRunner", side_by_side))

    def __exit__(self, *_) -> None:
        self.patches.close()

    def instead(self, function, *_):
        return self.attend if function is masked_attention else lambda *_: None  # it takes no plan

    def attend(self, q, k, v, clock, birth, death, kv_len=None, scale=None, block_table=None, plan=None) -> Tensor:
        if self.seen is None or self.seen[0] is not clock:
            moment = clock[:, None, :, None]
            self.seen = clock, (birth[:, None, None] <= moment) & (moment <= death[:, None, None])
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.seen[1], scale=scale)


def side_by_side(*arguments, block_table: BlockTable, pages: int, **named) -> runner.ModelRunner:
    """A `ModelRunner` without pages."""
    return runner.ModelRunner(*arguments, **named)
