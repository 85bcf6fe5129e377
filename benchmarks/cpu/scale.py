"""What one iteration of a running engine costs against slots and against context, and what memory that takes.

`run` times a tiny random pair on the CPU: how the parts grow, not how fast a model is. `count` has no clock: launches
as trace_iteration.py counts them, and bytes from the shapes that a published pair has on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import statistics
import time
from collections.abc import Callable

import torch

import simsd
from simsd.decode import draft as drafting
from simsd.decode.iteration import Parts
from simsd.engine.pages import page_bytes, places_of
from simsd.models.families.sdar import SDARConfig, SDARForCausalLM
from simsd.models.loading import LoadedModel

from ..contest import Bench
from ..gpu.predictions import H100_GB_S
from ..report import Table
from . import trace_iteration as tracing

BLOCK, LOOKAHEAD, ROWS = 4, 2, 16  # rows: of drafted states, of each slot
POSITIONS = 2**17  # of the tiny models
PREFILL_ROWS = 2048
WARM_UP = 3  # iterations
H100_TFLOP_S = 989  # NVIDIA's data sheet: bfloat16, dense
PARTS = ("forwards", "control ops", "host")
BYTES = ("weights", "keys and values", "scratch", "logits")
TIMED = Table(
    [
        *(("slots", "{slots}"), ("context", "{context}"), ("ms per iteration", "{ms:.2f}")),
        *((part, f"{{parts[{part}]:.2f}}") for part in PARTS),
        *(("ms per slot", "{ms_per_slot:.3f}"), ("pages in use", "{used}"), ("owned", "{owned}"), ("use", "{use:.0%}")),
    ]
)
COUNTED = Table(
    [
        *(("slots", "{slots}"), ("context", "{context}"), ("target rows", "{rows}"), ("launches", "{launches}")),
        *((f"{part}, GB", f"{{gb[{part}]:.2f}}") for part in BYTES),
        *(("ms for these", "{memory_ms:.1f}"), ("ms for products", "{products_ms:.1f}"), ("GB held", "{held_gb:.0f}")),
    ]
)


class Running:
    """An engine all of whose slots are taken, each by a text of `context` tokens and what was decoded since."""

    def __init__(self, target: LoadedModel, draft: LoadedModel, slots: int, context: int, iterations: int) -> None:
        self.forwards_ms = self.decoding_ms = 0.0
        # The first decode while the last are still computed: all have room for that.
        behind = slots + slots * context // PREFILL_ROWS
        new = (behind + WARM_UP + iterations) * LOOKAHEAD * BLOCK
        forward = self.clocked(drafting.run_plan, "forwards_ms")
        self.engine = simsd.Engine(
            target,
            draft,
            parts=Parts(forward=forward, proposer=functools.partial(drafting.by_model, forward=forward)),
            max_batch=slots,
            max_length=context + new + BLOCK,
            prefill_rows=PREFILL_ROWS,
            lookahead=LOOKAHEAD,
            max_rows=slots * ROWS,
            prefix_cache=False,
        )
        draw = random.Random(0)
        for _ in range(slots):
            prompt = [draw.randrange(target.mask_token_id) for _ in range(context)]
            self.engine.add(prompt, max_new_tokens=new, drafter="model")
        waiting = set(range(slots))
        while waiting:
            waiting -= {update.index for update in self.engine.step() if update.tokens}
        runner = self.engine.loop.batch.runner
        runner.run = self.clocked(runner.run, "decoding_ms")

    def clocked(self, function: Callable, name: str) -> Callable:
        def call(*arguments, **named):
            began = time.perf_counter()
            out = function(*arguments, **named)
            setattr(self, name, getattr(self, name) + 1e3 * (time.perf_counter() - began))
            return out

        return call

    def iterate(self) -> dict[str, float]:
        """Milliseconds of an iteration and of its parts."""
        self.forwards_ms = self.decoding_ms = 0.0
        began = time.perf_counter()
        updates = self.engine.step()
        ms = 1e3 * (time.perf_counter() - began)
        if any(update.result for update in updates):
            raise RuntimeError("a request came to its end: the slots are no longer all taken")
        control = self.decoding_ms - self.forwards_ms
        return dict(zip(("ms", *PARTS), (ms, self.forwards_ms, control, ms - self.decoding_ms), strict=True))

    def pages(self) -> tuple[int, int]:
        """Pages that texts reach into, and those that their slots own."""
        loop, metrics = self.engine.loop, self.engine.metrics()
        size = self.engine.config.page_size
        used = sum(-(-len(occupant.request.tokens) // size) for _, occupant in loop.scheduler.occupied)
        return used, metrics.pages - metrics.free_pages


def tiny(seed: int, layers: int) -> LoadedModel:
    """A model of random weights that never ends."""
    torch.manual_seed(seed)
    config = SDARConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        block_length=BLOCK,
        mask_token_id=299,
        initializer_range=0.3,
    )
    return dataclasses.replace(simsd.load(SDARForCausalLM(config).eval()), end_token_ids=())


def run(bench: Bench, slots: list[int], contexts: list[int], at_context: int, at_slots: int, iterations: int) -> None:
    """`slots` behind `at_context` tokens each, then `at_slots` behind each of the `contexts`."""
    target, draft = (tiny(seed, layers) for seed, layers in ((0, 2), (1, 1)))
    for count, context in [*((one, at_context) for one in slots), *((at_slots, one) for one in contexts)]:
        running = Running(target, draft, count, context, iterations)
        taken = [running.iterate() for _ in range(WARM_UP + iterations)][WARM_UP:]
        middle = {name: statistics.median(one[name] for one in taken) for name in taken[0]}
        ms, (used, owned) = middle.pop("ms"), running.pages()
        bench.row(
            TIMED,
            slots=count,
            context=context,
            ms=ms,
            parts=middle,
            ms_per_slot=ms / count,
            used=used,
            owned=owned,
            use=used / owned,
        )


def count(bench: Bench, target: str, draft: str, slots: list[int], contexts: list[int], states: int) -> None:
    """`states`: of blocks that the target sees of each slot."""
    for number in slots:
        shape = tracing.exact_shape(number, BLOCK, LOOKAHEAD, states)
        launches = tracing.trace(target, draft, shape, number, BLOCK)
        for context in contexts:
            gb, products = moved(launches, context)
            bench.row(
                COUNTED,
                slots=number,
                context=context,
                launches=launches.kernels,
                gb=gb,
                tflop=products / 1e12,
                rows=next(rows for call, rows in attentions(launches) if call.part == "forward"),
                memory_ms=1e3 * sum(gb.values()) / H100_GB_S,
                products_ms=products / H100_TFLOP_S / 1e9,
                held_gb=held(target, draft, number, context, states) / 1e9,
            )


def attentions(launches: tracing.Launches) -> list[tuple[tracing.Launch, int]]:
    """The attention of each layer of each forward, with the rows of it."""
    calls = [call for call in launches.calls if call.op == "simsd::masked_attention"]
    return [(call, call.arguments[0].shape[0] * call.arguments[0].shape[2]) for call in calls]


def moved(launches: tracing.Launches, context: int) -> tuple[dict[str, float], float]:
    """GB that the forwards read and write of each kind, activations left out, and the operations of their products, in
    an iteration behind `context` tokens in each slot: weights, and keys and values of texts, are read once in each
    forward, those of the rows written and read, logits written and read."""
    found, products = dict.fromkeys(BYTES, 0.0), 0.0
    for call in launches.calls:
        if call.op == "simsd::thin_linear":
            x, weight = call.arguments[:2]
            found["weights"] += nbytes(weight)
            products += 2.0 * len(x) * weight.numel()
            if len(weight) == tracing.VOCABULARY:
                found["logits"] += 2 * len(x) * len(weight) * weight.itemsize
    for call, rows in attentions(launches):
        q, k = call.arguments[:2]
        token = 2 * k.shape[1] * k.shape[3] * k.itemsize
        found["keys and values"] += len(q) * context * token
        found["scratch"] += 2 * rows * token
        products += 4.0 * q.numel() * context
    return {kind: size / 1e9 for kind, size in found.items()}, products


def held(target: str, draft: str, slots: int, context: int, states: int) -> float:
    """Bytes of weights, of keys and values of texts and of what is not committed, and of the logits that are kept."""
    with tracing.without_a_gpu():
        models = [tracing.fake_model(name, BLOCK) for name in (target, draft)]
        places = places_of(
            *models,
            slots=slots,
            capacity=context,
            block_length=BLOCK,
            states=states,
            page_size=tracing.PAGE_SIZE,
            kv_memory=tracing.KV_MEMORY * slots,
        )
        weights = sum(nbytes(one) for model in models for one in model.model.parameters())
        caches = (places.target, places.draft)
        pages = sum(
            places.count(room) * page_bytes(model, places.page_size) for model, room in zip(models, caches, strict=True)
        )
        return weights + pages + slots * states * BLOCK * tracing.VOCABULARY * models[0].dtype.itemsize


def nbytes(x: torch.Tensor) -> int:
    return x.numel() * x.itemsize
