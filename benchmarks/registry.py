"""Every benchmark, declared once: what it compares and how, on which device, how it runs in full and in short.

Nothing here imports torch: what there is, and what is wrong with a command, is told at once.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """
    Attributes:
        run: the function in this package, as "module:function"; called with a `contest.Bench` and the settings.
        about: what it compares and how: the first line of its results.
        settings: of a full run, by name; `threads` is torch's number of them, and is not passed on.
        short: what a rehearsal has in the place of some; a GPU's benchmarks take theirs from `Bench.tiny`.
        device: "cpu" or "gpu". seconds: of a GPU's run that it should have; on the CPU it takes what it takes.
        asked: whether it runs only where it is named.
        picture: what draws its rows into an SVG file, NAME.svg beside its results, as "module:function"; called with
            the rows and the path.
    """

    run: str
    about: str
    settings: dict = dataclasses.field(default_factory=dict)
    short: dict = dataclasses.field(default_factory=dict)
    device: str = "cpu"
    seconds: float = float("inf")
    asked: bool = False
    picture: str = ""

    def function(self) -> Callable:
        return _named(self.run)

    def draw(self, rows: list[dict], path: Path) -> None:
        """Only where there is a picture; needs matplotlib."""
        _named(self.picture)(rows, path)


SIMSD_BENCH = {
    "items": 50,
    "batches": [1],
    "modes": ["native", "exact-model", "exact-self", "exact-auto"],
    "temperature": 0.0,
    "pair": "tiny",
    "block_length": 4,
    "strategy": "low_confidence_static",
}


def _named(place: str) -> Callable:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"benchmarks.{module}"), name)


def of_a_gpu(run: str, seconds: float, about: str) -> Benchmark:
    return Benchmark(f"gpu.{run}", about, device="gpu", seconds=seconds)


BENCHMARKS = {
    "attention_cpu": Benchmark(
        "cpu.attention_cpu:run",
        "`masked_attention` against `scaled_dot_product_attention(..., attn_mask=dense, enable_gqa=True)`, 32 query and"
        " 8 key/value heads of 128, interleaved in one process. Median (quartiles); ratio of medians and of best times,"
        " higher is better.",
        {"threads": 2, "seconds": 3.0},
        {"seconds": 0.01},
    ),
    "training": Benchmark(
        "cpu.training:run",
        "A training step of tiny-target by `masked_attention` and by `scaled_dot_product_attention` with a dense mask,"
        " in turn in one process. Median (quartiles); ratio of medians and of best times, higher is better.",
        {"threads": 1, "seconds": 30.0, "items": 64, "tokens": [128, 512, 2048]},
        {"seconds": 0.01, "items": 4, "tokens": [16]},
    ),
    "graph_shapes": Benchmark(
        "cpu.graph_shapes:run",
        "Target forwards over native's (mean of families), exact, where each may hold `rows` rows of drafted states."
        " Others' choice of states, replayed along native's path: the self chain (SSD, FreeDave), a graph calibrated"
        " offline (Spiffy), a tree of orders (SPOT's shape); in the engine: a chain in the draft model's order, and"
        " ours, by who drafts. Ours/best: the best of ours over the best of the others, without auto, which drafts"
        " where measured times make it pay. Draft: draft forwards over native's target forwards.",
        {
            "threads": 1,
            "pair": "long",
            "items": 20,
            "calibration": 200,
            "families": ["arithmetic", "code", "facts", "choice"],
            "block_lengths": [4, 8, 16, 32],
            "max_rows": [128, 512],
            "temperatures": [0.0, 0.8],
            "max_new_tokens": 128,
        },
        {
            "pair": "tiny",
            "items": 1,
            "calibration": 2,
            "families": ["facts"],
            "block_lengths": [4],
            "max_rows": [32],
            "temperatures": [0.0],
            "max_new_tokens": 8,
        },
        picture="cpu.graph_plot:save",
    ),
    "useless_draft": Benchmark(
        "cpu.useless_draft:run",
        "Exact decoding with a draft of random weights against native decoding: wall time, median of the ratios of"
        " interleaved pairs and its 95% interval; batch 1.",
        {"pairs": 25, "items": 2, "max_new_tokens": 96},
        {"pairs": 1, "items": 1, "max_new_tokens": 8},
    ),
    "useless_head": Benchmark(
        "cpu.useless_head:run",
        "Automatic drafting with an order head of random weights: what it costs over doing without one, as a share of"
        " native decoding's wall time; medians of interleaved rounds and their 95% interval; batch 1.",
        {"rounds": 15, "items": 2, "block_lengths": [8, 16, 32], "max_new_tokens": 128},
        {"rounds": 1, "items": 1, "block_lengths": [8], "max_new_tokens": 8},
    ),
    "lookup": Benchmark(
        "cpu.lookup:run",
        "Drafts from the text itself, the built-in pair: target forwards and wall time over those of native decoding"
        " (medians; the interval is the 95% interval of the median ratio of interleaved runs). The tasks; the same"
        " questions behind themselves and their answers; the tasks with no token that ends the text.",
        {
            "threads": 1,
            "pairs": 9,
            "items": 8,
            "texts": ["tasks", "answered before", "never ending"],
            "max_new_tokens": 96,
            "max_batch": 1,
        },
        {"pairs": 1, "items": 1, "max_new_tokens": 8},
    ),
    "batch_invariance": Benchmark(
        "cpu.batch_invariance:run",
        "Does a row's result change, in any bit, with the rows beside it?",
        {"threads": 2, "seconds": 2.0, "models": ["tiny-target", "tiny-draft", "tiny-target bfloat16", "random MoE"]},
        {"seconds": 0.01, "models": ["tiny-target", "random MoE"]},
    ),
    "trace_iteration": Benchmark(
        "cpu.trace_iteration:run",
        "What one decoding iteration launches on a GPU, counted on fake tensors, without a GPU: kernels by part and op."
        " Neither reads by the host nor uploads are allowed: a CUDA graph of it could not be replayed.",
        {"target": "8B", "draft": "1.7B", "batch": 1, "block_length": 4, "lookahead": 2, "states": 16},
        {"target": "1.7B", "lookahead": 1, "states": 4},
    ),
    "fused_layers": Benchmark(
        "cpu.fused_layers:run",
        "A native forward of tiny-target (rows / 4 sequences, each a block of 4 rows behind 120 tokens): milliseconds,"
        " medians of contestants that took turns (in brackets the best forward).",
        {"threads": 1, "seconds": 3.0, "rows": [4, 32, 132, 512], "dtypes": ["float32", "bfloat16", "float16"]},
        {"seconds": 0.01, "rows": [4], "dtypes": ["float32"]},
    ),
    "loop": Benchmark(
        "cpu.loop:run",
        "Exact decoding (`drafter=auto`) beside native decoding, the built-in pair, interleaved. The interval is the"
        " 95% interval of the median ratio.",
        {"pairs": 15, "batches": [1, 8, 32, 64], "max_new_tokens": 96},
        {"pairs": 1, "batches": [1], "max_new_tokens": 8},
    ),
    "loop_profile": Benchmark(
        "cpu.loop_profile:run",
        "An iteration of exact decoding (`drafter=auto`, the built-in pair) outside the models' forwards, under"
        " cProfile: microseconds, and shares of their sum. Python code is slower so; `loop` has the times without.",
        {"batches": [1, 32], "max_new_tokens": 96},
        {"batches": [2], "max_new_tokens": 8},
    ),
    "scale": Benchmark(
        "cpu.scale:run",
        "An iteration of an engine all of whose slots decode (exact, drafted for by the draft model), against slots and"
        " against the tokens that each holds: milliseconds, medians, of a tiny random pair. Control ops: all that an"
        " iteration does on the device besides forwards. Pages: of 64 tokens, in use by texts and owned by slots.",
        {
            "threads": 1,
            "slots": [1, 4, 16, 64, 256],
            "contexts": [128, 1024, 8192, 32768],
            "at_context": 128,
            "at_slots": 4,
            "iterations": 30,
        },
        {"slots": [1, 2], "contexts": [64], "at_context": 16, "at_slots": 2, "iterations": 2},
    ),
    "scale_counted": Benchmark(
        "cpu.scale:count",
        "An iteration of SDAR-8B on a GPU, counted on fake tensors, without a GPU or a clock: what it launches; what"
        " its forwards, one of the target and two of the draft, read and write (see cpu/scale.py); how long an H100"
        " takes at least for that (3.35 TB/s) and for their products (989 TFLOP/s); what is held in memory.",
        {
            "target": "8B",
            "draft": "1.7B",
            "slots": [1, 8, 32, 64, 128, 256],
            "contexts": [1024, 8192, 32768],
            "states": 5,
        },
        {"target": "1.7B", "slots": [2], "contexts": [1024]},
    ),
    "long_prompt": Benchmark(
        "cpu.long_prompt:run",
        "A prompt of 5,000 tokens comes while 8 requests decode natively, by `prefill_rows` (8192: in one piece):"
        " milliseconds to its first tokens, and between two updates of one of the others meanwhile. A tiny model of"
        " random weights; medians of runs.",
        {"threads": 1, "slots": 8, "tokens": 5000, "prefill_rows": [128, 512, 2048, 8192], "repeats": 5},
        {"slots": 2, "tokens": 200, "prefill_rows": [64], "repeats": 1},
    ),
    "quantized": Benchmark(
        "cpu.quantized:run",
        "tiny-target, the matrices of its layers stored in several ways (embeddings, head and norms are in the dtype"
        " of activations), greedy, on held-out items: exact answers, tokens that are float32's at the same place, texts"
        " in which exact decoding (tiny-draft, float32) differs from native, tokens per second (median of batches, in"
        " turn), and the size of all weights.",
        {
            "threads": 1,
            "items": 200,
            "batch": 32,
            "cases": ["float32", "bfloat16", "int8 float32", "int8 bfloat16", "int4 float32", "int4 bfloat16"],
            "max_new_tokens": 96,
        },
        {"items": 2, "cases": ["float32", "int8 float32"], "max_new_tokens": 8},
    ),
    "load_memory": Benchmark(
        "cpu.load_memory:run",
        "Loading a random sharded checkpoint by `simsd.load` and by transformers' `from_pretrained`, and reading each"
        " weight once: the peak of a process's memory above what it had before, over the weights' size, and seconds"
        " (files in the page cache); medians of processes in turn. transformers leaves what needs no cast in the mapped"
        " files, whose touched pages count.",
        {
            "threads": 1,
            "cases": ["as stored", "cast from float32", "experts one by one"],
            "mib": 1024,
            "repeats": 3,
        },
        {"cases": ["as stored"], "mib": 8, "repeats": 1},
    ),
    "exactness": Benchmark(
        "cpu.exactness:run",
        "Is exact decoding's text native decoding's, token for token?",
        {"threads": 1, "selection": "full", "only": ""},
        {"selection": "quick", "only": "T = 3: near draft, low"},
    ),
    "soak": Benchmark(
        "cpu.soak:run",
        "Requests that come, go and are cancelled over memory too small for all: every text against the same request's"
        " alone, every page free at the end, the process no larger.",
        {
            "threads": 1,
            "requests": 2000,
            "slots": 16,
            "seed": 0,
            "target": "tiny-target",
            "draft": "tiny-draft",
            "draft_device": "",
        },
        {"requests": 80, "slots": 8},
        asked=True,
    ),
    "serve": Benchmark(
        "cpu.serve:run",
        "`simsd serve` of the built-in pair in a process of its own, and clients that stream on loopback: half of the"
        " requests are left at random, some readers are slow, some bodies malformed, SIGTERM at the end. Every text"
        " against the same request's alone. Server and clients share the machine's cores.",
        {"threads": 1, "clients": 64, "seconds": 180.0, "slots": 32, "seed": 0},
        {"clients": 8, "seconds": 4.0, "slots": 4},
        asked=True,
    ),
    "ray_faults": Benchmark(
        "cpu.ray_faults:run",
        "`simsd batch` and `simsd serve --replicas 2` of the built-in pair on a Ray cluster of one machine, while"
        " workers, the job itself and replicas are killed. Every row and every answer against the same decoded alone.",
        {"threads": 1, "rows": 4000, "shard_rows": 64, "kills": 6, "clients": 8, "seconds": 120.0, "seed": 0},
        {"rows": 400, "shard_rows": 16, "kills": 2, "clients": 4, "seconds": 6.0},
        asked=True,
    ),
    "audit": Benchmark(
        "cpu.commands:audit",
        "`simsd audit` on the built-in pair: what speculative decoding must leave as it is, and does.",
        {"items": 5, "seeds": 3000, "max_new_tokens": 32},
        {"items": 1, "seeds": 200, "max_new_tokens": 4},
    ),
    "tiny_pair": Benchmark(
        "cpu.commands:bench",
        "`simsd bench` of the built-in pair: every mode on the same prompts in the same run.",
        SIMSD_BENCH | {"items": 100, "batches": [1, 8], "modes": []},
        {"items": 1, "batches": [1, 2]},
    ),
    "tiny_pair_t08": Benchmark(
        "cpu.commands:bench",
        "`simsd bench` of the built-in pair at temperature 0.8: modes on the same prompts in the same run.",
        SIMSD_BENCH | {"temperature": 0.8},
        {"items": 1},
    ),
    "tiny_pair_dynamic": Benchmark(
        "cpu.commands:bench",
        "`simsd bench` of the built-in pair where native decoding reveals all that it is confident of"
        " (low_confidence_dynamic, threshold 0.85).",
        SIMSD_BENCH | {"batches": [1, 8], "strategy": "low_confidence_dynamic"},
        {"items": 1},
    ),
    "long_pair": Benchmark(
        "cpu.commands:bench",
        "`simsd bench` of the built-in pair for long answers in blocks of 16, with its order head.",
        SIMSD_BENCH | {"items": 10, "pair": "long", "block_length": 16},
        {"items": 1, "modes": ["exact-auto"]},
    ),
    "long_pair_dynamic": Benchmark(
        "cpu.commands:bench",
        "The same where native decoding reveals all that it is confident of (low_confidence_dynamic, threshold 0.85).",
        SIMSD_BENCH | {"items": 10, "pair": "long", "block_length": 16, "strategy": "low_confidence_dynamic"},
        {"items": 1},
    ),
    "busy": Benchmark(
        "cpu.busy:run",
        "What a machine that others use too costs: `simsd bench` on a quiet machine, then beside a busy process on"
        " every core, in turn; medians.",
        {"rounds": 3, "items": 5},
        {"rounds": 1, "items": 1},
        asked=True,
    ),
    "revisions": Benchmark(
        "cpu.revisions:run",
        "This checkout and another one, in turn: `simsd bench`, each run a process of its own, then batches; medians,"
        " and the 95% interval of the median ratio.",
        {"checkout": "", "rounds": 15, "items": 3, "batches": [1, 8, 32, 64], "turns": 31, "max_new_tokens": 64},
        {"rounds": 1, "items": 1, "batches": [2], "turns": 1, "max_new_tokens": 8, "checkout": "."},
        asked=True,
    ),
    "cuda_resources": Benchmark(
        "cpu.cuda_resources:run",
        "What each CUDA kernel takes of each GPU, as compiled: registers per thread / tensor core instructions (and"
        " stack and spills, where there are any); shared memory: KiB per block, at most. No GPU is needed.",
        asked=True,
    ),
    "cuda_counts": Benchmark(
        "cpu.cuda_counts:run",
        "Instructions of a warp in the inner loops of CUDA kernels, as compiled / the most that a test allows; then"
        " what products, filters and attention do in all. No GPU is needed.",
        asked=True,
    ),
    "triton_resources": Benchmark(
        "cpu.triton_resources:run",
        "What each Triton kernel takes of each GPU, compiled ahead of time: registers per thread / shared memory in KiB"
        " (and spills and stack, where there are any). No GPU is needed.",
        {"workers": 2, "kernels": ""},
        {"kernels": "silu_times"},
        asked=True,
    ),
    # A GPU's, in the order of what must not be missed: first whether the kernels are right. What one leaves of its time
    # is shared among those behind it, so that a build, which is rarely needed, takes nothing from the others.
    "build": of_a_gpu("library:build", 110, "The device and the compiled library, built where that is needed."),
    "test": of_a_gpu("correctness:test", 85, "The tests of every op on the CUDA kernels, and of decoding."),
    "sanitize": of_a_gpu("correctness:sanitize", 30, "Every op on small arguments under compute-sanitizer."),
    "ceilings": of_a_gpu("ceilings:run", 10, "The rates that all else is held against: a large copy and product."),
    "verification": of_a_gpu("verification:run", 20, "The small ops of a decoding step beside their definitions."),
    "attention": of_a_gpu("attention:run", 50, "masked_attention beside torch's and others' attention."),
    "sampling": of_a_gpu("sampling:run", 25, "sample_logits beside torch's softmax, argmax and multinomial."),
    "linear": of_a_gpu("linear:run", 20, "thin_linear and grouped_linear beside torch's products (cuBLAS)."),
    "end_to_end": of_a_gpu("end_to_end:run", 50, "Decoding at chosen acceptance rates, models of SDAR's shapes."),
    "store": of_a_gpu("stores:run", 10, "store_kv and qk_norm_rope_store beside the same by torch."),
    "counters": of_a_gpu("counters:count", 15, "What the hardware's counters say of the main kernels (ncu)."),
    "test_triton": of_a_gpu("correctness:test_triton", 25, "The tests of every op on the Triton kernels."),
}
KINDS = {
    kind: [name for name, one in BENCHMARKS.items() if one.device == kind and not one.asked] for kind in ("cpu", "gpu")
}

# The two calls of a day with a rented GPU: seconds in all, and of each. First whether the kernels are right and how
# fast they are; then decoding, the hardware's counters, and the Triton kernels.
CALLS = {
    1: (380.0, {
        "build": 90, "test": 115, "sanitize": 60, "ceilings": 12, "verification": 25, "attention": 80, "sampling": 40,
        "linear": 30,
    }),
    2: (300.0, {"build": 30, "end_to_end": 120, "store": 15, "counters": 35, "test_triton": 97}),
}  # fmt: skip
DEFAULT_BUDGET = 450.0
REHEARSAL_BUDGETS = {1: 380.0, 2: 200.0}
