"""What exactness.py compares: models, prompts and settings."""

from __future__ import annotations

import functools
import itertools
import random
from dataclasses import dataclass, replace
from typing import Any

import torch

import simsd
from simsd import questionnaires, tasks
from simsd.config import STRATEGIES, GenerationConfig
from simsd.models import families
from simsd.models.loading import LoadedModel
from simsd.tasks import FAMILIES

ONE_FACTOR = "built-in pair, one factor changed"
PAIRWISE = "built-in pair, every pair of factor values"
LONG = "built-in pair for long blocks, with its order heads, every pair of factor values"
RANDOM = "random weights"
UNPROMISED = "random weights as loaded, where the same bits are not promised"

VOCABULARY, END, MASK = 64, 60, 61  # of the random models
EACH = 75  # prompts of each family


# At 0.8 the built-in target nearly always says what it says at 0; here its seeds differ.
HOT = {"temperature": 3.0}


@dataclass(frozen=True)
class Shape:
    """A random-weight model: what differs from the smallest one, and how it is loaded and decoded.

    `other_shift`: whether the draft that is unlike it shifts.
    `deterministic`: a row's logits are the same bits beside any other rows. As loaded that is torch's affair: it holds
    for some shapes under some versions, and never in a mixture of experts (an expert runs on as many rows as chose it)
    nor where the intermediate size is no multiple of 8 (SiLU's elements behind the last whole vectors round
    differently).
    """

    changes: tuple[tuple[str, int], ...] = ()
    block_length: int = 4
    steps: int | None = None
    family: str = "sdar"
    shift: bool = False
    other_shift: bool = False
    dtype: str = "float32"
    deterministic: bool = True


def heads(query: int, key: int) -> tuple[tuple[str, int], ...]:
    return ("num_attention_heads", query), ("num_key_value_heads", key)


SHAPES = {
    "block 4": Shape(),
    "block 4, T = 3": Shape(steps=3),
    "block 8": Shape(block_length=8),
    "block 8, T = 3": Shape(block_length=8, steps=3),
    "block 16": Shape(block_length=16),
    "block 16, T = 5": Shape(block_length=16, steps=5),
    "block 3": Shape(block_length=3),
    "block 5": Shape(block_length=5),
    "block 5, T = 2": Shape(block_length=5, steps=2),
    "GQA 1": Shape(heads(4, 4)),
    "GQA 4": Shape(heads(4, 1)),
    "GQA 8": Shape(heads(8, 1)),
    "hidden size 72, 3 layers": Shape((("hidden_size", 72), ("num_hidden_layers", 3))),
    "intermediate size 100": Shape((("intermediate_size", 100),)),
    "bfloat16": Shape(dtype="bfloat16"),
    "bfloat16, block 8": Shape(block_length=8, dtype="bfloat16"),
    "MoE": Shape(family="sdar_moe"),
    "MoE, block 8": Shape(block_length=8, family="sdar_moe"),
    "shift": Shape(shift=True),
    "shift, block 8, T = 3": Shape(block_length=8, steps=3, shift=True),
    "shift, block 5, bfloat16": Shape(block_length=5, shift=True, dtype="bfloat16"),
    "MoE, shift, block 5": Shape(block_length=5, family="sdar_moe", shift=True, other_shift=True),
    "Qwen3": Shape(family="qwen3", other_shift=True),
    "Qwen2, shift": Shape(family="qwen2", shift=True),
    "Fast-dLLM v2, block 8": Shape((("sub_block_length", 3),), 8, family="fast_dllm_v2", shift=True),
    "Qwen2, block 8, bfloat16": Shape(block_length=8, family="qwen2", other_shift=True, dtype="bfloat16"),
    "Llama": Shape(family="llama"),
    "Llama, shift, block 8, T = 3": Shape(block_length=8, steps=3, family="llama", shift=True, other_shift=True),
    "LLaDA2": Shape(family="llada2"),
    "LLaDA2, bfloat16": Shape(family="llada2", dtype="bfloat16"),
    "block 4 as loaded": Shape(deterministic=False),
    "bfloat16 as loaded": Shape(dtype="bfloat16", deterministic=False),
    "MoE as loaded": Shape(family="sdar_moe", deterministic=False),
    "intermediate size 100 as loaded": Shape((("intermediate_size", 100),), deterministic=False),
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
EXPERTS = {
    "sdar_moe": _EXPERTS | {"num_experts": 6},
    "llada2": _EXPERTS | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "use_qk_norm": True},
}
BUILT_IN = {
    "tiny-target": {},
    "tiny-draft": {},
    "tiny-target, deterministic": {"deterministic": True},
    "long-target": {},
    "long-draft": {},
}
# Two drafts for every shape. One is of another size and seldom agrees; the other is the target with noise on its
# weights, so that the target's walk through what it drafts gets long.
UNLIKE, NEAR = "unlike", "near"


@functools.cache
def model(name: str) -> LoadedModel:
    """A built-in model, a shape of SHAPES, or one of its drafts ("<shape>/near", "<shape>/unlike")."""
    if name in BUILT_IN:
        return simsd.load(name.split(",")[0], **BUILT_IN[name])
    shape_name, _, role = name.partition("/")
    shape = SHAPES[shape_name]
    if role == UNLIKE:
        changes = ("hidden_size", 16), ("num_hidden_layers", 1)
        shape = Shape(changes, shape.block_length, shift=shape.other_shift, dtype=shape.dtype)
    return random_model(shape, seed=1 if role == UNLIKE else 0, noise=0.02 if role == NEAR else 0.0)


def random_model(shape: Shape, seed: int, noise: float) -> LoadedModel:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "block_length": shape.block_length,
        "mask_token_id": MASK,
        "eos_token_id": END,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    } | dict(shape.changes)
    family = families.by_name(shape.family)
    settings |= EXPERTS.get(shape.family, {}) | {"shift": shape.shift}
    torch.manual_seed(seed)
    built = family.model_class(family.config_class(**settings))
    with torch.no_grad():
        built.lm_head.weight *= 4  # confidences that differ
        for parameter in built.parameters() if noise else ():
            parameter += noise * torch.randn_like(parameter)
    return simsd.load(built.eval(), dtype=shape.dtype, deterministic=shape.deterministic)


@functools.cache
def prompts(target: str) -> list[list[int]]:
    """What a model is asked, the families taking turns; random tokens of ragged lengths for random weights."""
    if target in BUILT_IN:
        asked = questionnaires if target.startswith("long") else tasks
        families = [asked.held_out(family, EACH) for family in FAMILIES]
        return [model(target).encode_prompt(task.prompt) for turn in zip(*families, strict=True) for task in turn]
    rng = random.Random(target)
    # Attention sums keys in splits of 256 slots; every seventh prompt is about that long.
    lengths = [rng.randint(240, 280) if n % 7 == 5 else rng.randint(1, 40) for n in range(50)]
    return [[rng.randrange(1, END) for _ in range(length)] for length in lengths]


@dataclass(frozen=True)
class Setting:
    """One way to decode some of a model's prompts, to be compared with native decoding of each prompt alone.

    Attributes:
        target, draft: names of models (see `model`); draft None: none.
        numbers: which of the target's prompts, in the order in which they are given to the decoder.
        batch: prompts decoded at a time.
        seeds: prompt number n has seed config.seed + n % seeds.
        cancel_every: one in so many sequences is cancelled after its first tokens; 0: none.
    """

    group: str
    name: str
    target: str
    draft: str | None
    config: GenerationConfig
    numbers: tuple[int, ...]
    batch: int = 1
    seeds: int = 1
    cancel_every: int = 0

    def seed(self, number: int) -> int:
        return self.config.seed + number % self.seeds


def settings(quick: bool = False) -> list[Setting]:
    """All of them, or as many on few prompts each."""
    return [
        *one_factor(12 if quick else 300),
        *pairwise(PAIRWISE, FACTORS, "tiny", 2 if quick else 20),
        *pairwise(LONG, LONG_FACTORS, "long", 1 if quick else 20),
        *random_weights(2 if quick else 50, quick),
    ]


def one_factor(count: int) -> list[Setting]:
    sampling, short, mixed = {"temperature": 0.8}, {"max_new_tokens": 64}, {"batch": 3, "seeds": 3}
    quick = count < 100
    changes: list[tuple[str, dict, dict]] = [
        ("defaults, draft model, batch 1", {}, {}),
        *((f"strategy {name}", {"strategy": name}, {}) for name in STRATEGIES if name != "low_confidence_static"),
        ("temperature 0.8", sampling, {}),
        ("temperature 0.8, top_p 0.9", sampling | {"top_p": 0.9}, {}),
        ("temperature 0.8, top_k 20", sampling | {"top_k": 20}, {}),
        ("temperature 0.8, seed 1", sampling | {"seed": 1}, {}),
        ("temperature 0.8, seed 2", sampling | {"seed": 2}, {}),
        ("temperature 0.8, seeds 0, 1 and 2 in one batch of 3", sampling, mixed),
        ("temperature 3", HOT | short, {}),
        ("temperature 3, drafter self", HOT | short | {"drafter": "self"}, {}),
        ("temperature 3, top_p 0.9, seeds 0, 1 and 2 in one batch of 3", HOT | short | {"top_p": 0.9}, mixed),
        ("batch 3", {}, {"batch": 3}),
        ("batch 8", {}, {"batch": 8}),
        ("batch 3, prompts shuffled", {}, {"batch": 3, "shuffle": 1}),
        ("batch 8, prompts shuffled", {}, {"batch": 8, "shuffle": 2}),
        ("batch 3, one sequence in 10 cancelled", {}, {"batch": 3, "cancel_every": 10}),
        ("temperature 0.8, batch 8, one sequence in 10 cancelled", sampling, {"batch": 8, "cancel_every": 10}),
        ("drafter model", {"drafter": "model"}, {}),
        ("drafter self", {"drafter": "self"}, {}),
        ("drafter lookup", {"drafter": "lookup"}, {}),
        ("drafter lookup, never at an end", {"drafter": "lookup", "end_token_ids": (), "max_new_tokens": 64}, {}),
        ("temperature 3, drafter lookup, batch 3", HOT | short | {"drafter": "lookup"}, {"batch": 3}),
        ("drafter auto, no draft model", {}, {"draft": None}),
        ("lookahead 1", {"lookahead": 1}, {}),
        ("lookahead 3", {"lookahead": 3}, {}),
        ("T = 2", {"steps": 2}, {}),
        ("T = 1", {"steps": 1}, {}),
        *((f"sub-blocks of 2, {name}", {"sub_block_length": 2, "strategy": name}, {}) for name in STRATEGIES),
        *(
            (
                f"sub-blocks of 3 in blocks of 8, {name}, temperature 3, batch 3",
                HOT | short | {"sub_block_length": 3, "block_length": 8, "strategy": name},
                {"batch": 3},
            )
            for name in STRATEGIES
        ),
        ("sub-blocks of 3 in blocks of 8, T = 3", {"sub_block_length": 3, "block_length": 8, "steps": 3}, {}),
        ("target deterministic", {}, {"target": "tiny-target, deterministic"}),
    ]
    found = []
    for name, change, more in changes:
        more = {"target": "tiny-target", "draft": "tiny-draft"} | more
        several = more.get("batch", 1) > 1  # a batch needs enough prompts to be one
        numbers = list(range(count if several or not quick else count // 3))
        if shuffle := more.pop("shuffle", 0):
            random.Random(shuffle).shuffle(numbers)
        config = GenerationConfig(**change)
        found.append(Setting(ONE_FACTOR, name, config=config, numbers=tuple(numbers), **more))
    return found


FACTORS: dict[str, tuple] = {
    "strategy": STRATEGIES,
    "sampling": (
        {},
        {"temperature": 0.8},
        HOT | {"top_p": 0.9},
        HOT | {"top_k": 20},
    ),
    "seed": (0, 1, 2),
    "batch": (1, 3, 8),
    "drafter": ("auto", "model", "self", "lookup"),
    "lookahead": (1, 2, 3),
    "steps": (None, 1, 2, 4),
    "max_rows": (None, 0, 16, 64),
    "draft_steps": (None, 1, 2),
    "block_length": (4, 8),
}
LONG_FACTORS: dict[str, tuple] = {
    "block_length": (8, 16, 32),
    "strategy": STRATEGIES,
    "sampling": ({}, {"temperature": 0.8}),
    "drafter": ("self", "auto", "lookup"),
    "max_rows": (None, 128, 512),
    "batch": (1, 3, 8),
    "steps": (None, 4),
}


def sub_block_lengths(length: int, steps: int | None, strategy: str) -> range:
    """Those that a block of `length` may be decoded by in so many steps."""
    if strategy == "entropy_bounded" and steps not in (None, length):
        return range(length, length + 1)
    return range(-(-length // (steps or length)), length + 1)


def covering_array(sizes: list[int]) -> list[list[int]]:
    """Rows of one value per factor (0..size - 1), in which every pair of values of two factors occurs.

    Greedy: a row starts from the first pair that is still missing and takes, factor by factor, what adds most.
    """
    missing = {
        pair: None
        for a, b in itertools.combinations(range(len(sizes)), 2)
        for pair in itertools.product(
            ((a, value) for value in range(sizes[a])), ((b, value) for value in range(sizes[b]))
        )
    }
    used = [[0] * size for size in sizes]
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for factor in range(len(sizes)):
            if factor in row:
                continue
            gains = [
                sum(tuple(sorted(((factor, value), other))) in missing for other in row.items())
                for value in range(sizes[factor])
            ]
            # Of equals the one that was used least.
            row[factor] = max(range(sizes[factor]), key=lambda v: (gains[v], -used[factor][v], -v))
        for pair in itertools.combinations(sorted(row.items()), 2):
            missing.pop(pair, None)
        for factor, value in row.items():
            used[factor][value] += 1
        rows.append([row[factor] for factor in range(len(sizes))])
    return rows


def pairwise(group: str, factors: dict[str, tuple], pair: str, count: int) -> list[Setting]:
    """Of a built-in pair, by the beginning of its models' names."""
    found = []
    available = len(FAMILIES) * EACH
    for n, row in enumerate(covering_array([len(values) for values in factors.values()])):
        change = {name: values[i] for (name, values), i in zip(factors.items(), row, strict=True)}
        name = ", ".join(f"{key} {value}" for key, value in change.items() if key != "sampling")
        sampling, batch = change.pop("sampling"), change.pop("batch")
        config = GenerationConfig(max_new_tokens=64, **change, **sampling)
        name = ", ".join([f"{key} {value}" for key, value in sampling.items()] or ["temperature 0"]) + ", " + name
        numbers = tuple((n * count + i) % available for i in range(max(count, 3) if batch > 1 else count))
        found.append(Setting(group, name, f"{pair}-target", f"{pair}-draft", config, numbers, batch))
    return found


def random_weights(count: int, quick: bool) -> list[Setting]:
    found = []
    for n, (name, shape) in enumerate(SHAPES.items()):
        base = GenerationConfig(max_new_tokens=30, steps=shape.steps)
        strategies = [STRATEGIES[(n + i) % len(STRATEGIES)] for i in range(2)]
        sampling = {"temperature": 0.8, "seed": n, "threshold": 0.4}
        rows: list[tuple[str, str | None, int, dict]] = [
            ("near draft", NEAR, 1, {"drafter": "model"}),
            (f"near draft, {strategies[0]}, temperature 0.8", NEAR, 3, sampling | {"strategy": strategies[0]}),
            ("unlike draft", UNLIKE, 3, {"drafter": "model", "lookahead": 3}),
            (f"self-draft, {strategies[1]}", None, 8, {"strategy": strategies[1], "threshold": 0.4}),
            (
                f"lookup, {strategies[0]}, temperature 0.8",
                None,
                3,
                sampling | {"drafter": "lookup", "strategy": strategies[0]},
            ),
        ]
        for i, (what, draft, batch, change) in enumerate(rows):
            if quick and i not in (n % 2, n % 5):
                continue
            group = RANDOM if shape.deterministic else UNPROMISED
            draft = None if draft is None else f"{name}/{draft}"
            # In a quick run each setting takes other prompts, long ones among them.
            numbers = tuple(range(count)) if not quick else tuple((3 * n + 2 * i + k) % 50 for k in range(count))
            setting = Setting(
                group, f"{name}: {what}, batch {batch}", name, draft, replace(base, **change), numbers, batch
            )
            found.append(setting)
    return found
