"""Which operations of a forward give a row other bits when other rows ride along, and what it costs to forbid it.

Every operation runs on the same rows at several row counts and in several batches, once in a model as loaded
("torch linear") and once in the same model loaded with deterministic=True ("thin_linear"). Attention is also moved
about in its cache, forwards are padded, and experts are crowded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

import simsd
from simsd.models.families.sdar import SDARMoeConfig, SDARMoeForCausalLM
from simsd.models.loading import LoadedModel
from simsd_kernels import INF, Visibility, masked_attention, sample_logits

from ..contest import Bench
from ..report import Table
from ..timing import measure

KERNELS = ("torch linear", "thin_linear")
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 20, 64, 128, 512)
COMPARED_WITH = 64  # rows
BATCHES = [(lanes, rows) for lanes in (3, 8) for rows in (1, 3, 4, 5, 20)]  # compared with one lane of as many rows
PREFIX = 300  # keys that every row of the attention checks sees
COST_ROWS = (4, 16, 64, 128)
COST_OF = ("ordinary", "deterministic")
# Wider than one vector, and no whole number of them.
ODD_WIDTH = 100


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_tokens(vocabulary: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(5, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def mixture_of_experts() -> nn.Module:
    torch.manual_seed(0)
    config = SDARMoeConfig(
        vocab_size=1713,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        initializer_range=0.1,
        mask_token_id=0,
    )
    return SDARMoeForCausalLM(config).eval()


def load(names: list[str]) -> dict[str, dict[str, LoadedModel]]:
    """Name -> linear kernel -> the model on it."""
    sources = {
        "tiny-target": ("tiny-target", "float32"),
        "tiny-draft": ("tiny-draft", "float32"),
        "tiny-target bfloat16": ("tiny-target", "bfloat16"),
        "random MoE": (mixture_of_experts(), "float32"),
    }
    return {
        name: {
            kernel: simsd.load(source, dtype=dtype, deterministic=kernel == "thin_linear", block_length=4)
            for kernel in KERNELS
        }
        for name, (source, dtype) in sources.items()
        if name in names
    }


@dataclass(frozen=True)
class Operation:
    """`call` maps rows [B, R, ...] to results [B, R, ...]; `rows` holds the first lane's, [512, ...]."""

    name: str
    call: Callable[[Tensor], Tensor]
    rows: Tensor

    def __call__(self, lanes: int, rows: int) -> Tensor:
        """The results of `rows` rows of the first lane's, which is the last of `lanes`; the others hold other rows."""
        other = [self.rows.roll(-rows * lane, 0)[:rows] for lane in range(1, lanes)]
        return self.call(torch.stack([*other, self.rows[:rows]]))[-1]


def operations(loaded: LoadedModel) -> Iterator[Operation]:
    model, config, dtype = loaded.model, loaded.config, loaded.dtype
    layer, most = model.model.layers[0], max(ROWS)
    attention, mlp = layer.self_attn, layer.mlp
    hidden = random(most, config.hidden_size, dtype=dtype)
    tokens = random_tokens(config.vocab_size, most)

    def linear(name: str, module: nn.Linear) -> Operation:
        return Operation(name, module, random(most, module.in_features, dtype=dtype))

    def silu(width: int) -> Operation:
        activation = (mlp.experts if hasattr(mlp, "experts") else mlp).act_fn
        pair = random(most, 2, width, dtype=dtype)
        return Operation(f"silu * up, {width} wide", lambda x: activation(x[:, :, 0].contiguous()) * x[:, :, 1], pair)

    yield Operation("embedding", model.model.embed_tokens, tokens)
    yield Operation("rms norm", layer.input_layernorm, hidden)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield linear(name, getattr(attention, name))
    heads = random(most, 2, attention.head_dim, dtype=dtype)
    yield Operation("rms norm of heads", attention.q_norm, heads)
    yield Operation("RoPE", lambda x: rope(model, x), heads)
    qkv = config.num_attention_heads + 2 * config.num_key_value_heads
    yield Operation("attention", lambda x: attend(config, x), random(most, qkv, attention.head_dim, dtype=dtype))
    if hasattr(mlp, "experts"):
        yield Operation("MoE router", lambda x: route(mlp.gate, x), hidden)
        yield Operation("MoE router and experts", mlp, hidden)
        yield silu(config.moe_intermediate_size)
    else:
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield linear(name, getattr(mlp, name))
        yield silu(config.intermediate_size)
    yield silu(ODD_WIDTH)
    yield linear("lm_head", model.lm_head)
    yield Operation("sample_logits", sample, random(most, config.vocab_size, dtype=dtype))
    yield Operation("whole forward", lambda x: forward(model, x), tokens)


def rope(model: nn.Module, x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    cos, sin = model.model.rotary_emb(x, positions)
    return apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]


def attend(config, x: Tensor) -> Tensor:
    """Rows [B, R, Hq + 2 Hkv, D], each of which sees the prefix and the rows up to itself."""
    kv_heads, (lanes, rows) = config.num_key_value_heads, x.shape[:2]
    q, k, v = x.transpose(1, 2).split([config.num_attention_heads, kv_heads, kv_heads], dim=1)
    cache = random(2, 1, kv_heads, PREFIX, x.shape[-1], dtype=x.dtype).expand(-1, lanes, -1, -1, -1)
    k, v = (torch.cat((prefix, new), dim=2) for prefix, new in zip(cache, (k, v), strict=True))
    clock = torch.arange(1, rows + 1, dtype=torch.int32).expand(lanes, -1)
    birth = torch.cat((torch.zeros(lanes, PREFIX, dtype=torch.int32), clock), dim=1)
    return masked_attention(q, k, v, clock, birth, torch.full_like(birth, INF)).transpose(1, 2)


def route(gate: nn.Module, x: Tensor) -> Tensor:
    logits, weights, chosen = gate(x)
    return torch.cat((logits, weights, chosen), dim=-1).view(*x.shape[:2], -1)


def sample(x: Tensor) -> Tensor:
    (lanes, rows), count = x.shape[:2], x.shape[0] * x.shape[1]
    drawn = sample_logits(
        x.flatten(0, 1),
        temperature=torch.ones(count),
        top_k=torch.full((count,), 50, dtype=torch.int32),
        top_p=torch.full((count,), 0.9),
        seed=torch.full((count,), 7),
        position=torch.arange(rows, dtype=torch.int32).repeat(lanes),
        revealed=torch.zeros(count, dtype=torch.int64),
    )
    return torch.stack([field.double() for field in drawn], dim=-1).view(lanes, rows, -1)


def forward(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits without a cache, causal: a row then sees the same keys however many rows follow."""
    seen = Visibility.block_causal(tokens.shape[1], 1)
    vectors = (vector.expand(tokens.shape) for vector in (seen.clock, seen.birth, seen.death))
    clocks = dict(zip(("clock", "birth", "death"), vectors, strict=True))
    return model(tokens, position_ids=torch.arange(tokens.shape[1])[None], use_cache=False, **clocks).logits


def measure_operation(operation: Operation) -> dict[str, list]:
    """The row counts and batches that differ."""
    expected = operation(1, COMPARED_WITH)
    rows = [count for count in ROWS if not torch.equal(operation(1, count)[:COMPARED_WITH], expected[:count])]
    batches = [
        f"{lanes} x {count}"
        for lanes, count in BATCHES
        if not torch.equal(operation(lanes, count), operation(1, count))
    ]
    return {"rows": rows, "batches": batches}


def attention_in_cache(start: int, copy: int = 0, capacity: int = 2048, lanes: int = 1, dtype=torch.float32) -> Tensor:
    """[Hq, 8, D] of a block's 8 rows that see PREFIX keys and each other, stored at slot start + 16 copy.

    What no row sees, the rest of the cache and the other lanes' keys, differs from call to call.
    """
    q_heads, kv_heads, rows, dim = 4, 2, 8, 32
    slot = start + 16 * copy
    seed = 1000 + start + copy + capacity + lanes
    q = random(lanes, q_heads, rows, dim, seed=seed, dtype=dtype)
    k, v = (random(lanes, kv_heads, capacity, dim, seed=seed + i, dtype=dtype) for i in (1, 2))
    q[-1] = random(q_heads, rows, dim, seed=1, dtype=dtype)
    for i, cache in enumerate((k, v)):
        cache[-1, :, :PREFIX] = random(kv_heads, PREFIX, dim, seed=2 + i, dtype=dtype)
        cache[-1, :, slot : slot + rows] = random(kv_heads, rows, dim, seed=4 + i, dtype=dtype)
    clock = torch.ones(lanes, rows, dtype=torch.int32)
    birth = torch.full((lanes, capacity), INF, dtype=torch.int32)
    for lane in range(lanes):  # ragged: every other lane has a shorter prefix
        birth[lane, : PREFIX - 17 * (lanes - 1 - lane)] = 0
    birth[:, slot : slot + rows] = 1
    return masked_attention(q, k, v, clock, birth, torch.full_like(birth, INF))[-1]


def measure_places() -> list[dict]:
    """Attention of one block wherever it lies: the copy first at the first multiple of 256 past the prefix."""
    cases = {
        "capacity 512 to 8192": [{"start": 512, "capacity": c} for c in (520, 768, 1000, 2048, 8192)],
        "batch of 3 or 8, ragged prefixes": [{"start": 512, "lanes": lanes} for lanes in (3, 8)],
        "scratch at other multiples of 256": [{"start": start} for start in range(512, 2048, 256)],
        "copy at any 16-slot boundary, two splits": [{"start": 512, "copy": copy} for copy in range(32)],
        "scratch at 64-multiples in the prefix's split": [{"start": start} for start in (320, 384, 448)],
        "scratch at 64-multiples past it": [{"start": start} for start in range(576, 1024, 64) if start % 256],
        "block at any slot of the scratch's split": [{"start": start} for start in range(513, 760, 13)],
    }
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        expected = attention_in_cache(512, dtype=dtype)
        for name, places in cases.items():
            outputs = [attention_in_cache(**place, dtype=dtype) for place in places]
            changed = [float((output != expected).float().mean()) for output in outputs]
            differ = [str(place) for place, share in zip(places, changed, strict=True) if share]
            found.append(
                {
                    "check": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "places": len(places),
                    "that_differ": differ,
                    "largest_share_of_outputs": max(changed),
                }
            )
    return found


def measure_prefill(loaded: LoadedModel) -> dict[str, list[str]]:
    """A prompt alone against the same prompt in padded and ragged batches, block-causal, as a prefill is: prompt to the
    batches that differ."""
    found: dict[str, list[str]] = {}
    for length in (4, 20, 300):
        prompt = random_tokens(loaded.vocab_size, length)
        alone = loaded.model(prompt[None], use_cache=False).logits[0]
        for side in ("right", "left"):
            differ = found[f"{length} tokens, {side} padding"] = []
            for padding, lanes in ((1, 1), (3, 1), (16, 1), (64, 1), (5, 3), (16, 8)):
                width = length + padding
                tokens = random_tokens(loaded.vocab_size, lanes, width, seed=1)
                mask = torch.ones(lanes, width, dtype=torch.int64)  # the other lanes are longer by the padding
                part = slice(0, length) if side == "right" else slice(padding, width)
                tokens[-1, part], mask[-1] = prompt, 0
                mask[-1, part] = 1
                got = loaded.model(tokens, attention_mask=mask, use_cache=False).logits[-1, part]
                if not torch.equal(got, alone):
                    differ.append(f"{lanes} x {width}")
    return found


def measure_groups(loaded: LoadedModel) -> list[int]:
    """Group sizes at which an expert's results for a row are not those in a group of 64."""
    experts, config = loaded.model.model.layers[0].mlp.experts, loaded.config
    hidden = random(64, config.hidden_size)
    chosen = torch.tensor([[1, 5]]).expand(64, -1).contiguous()
    shares = torch.tensor([[0.75, 0.25]]).expand(64, -1).contiguous()
    others = torch.tensor([[0, 2]]).expand(64, -1)
    expected = experts(hidden, chosen, shares)[0]
    differ = []
    for size in range(1, 65):
        # The first `size` rows take the row's experts, the rest others.
        crowd = torch.cat((chosen[:size], others[size:]))
        if not torch.equal(experts(hidden, crowd, shares)[0], expected):
            differ.append(size)
    return differ


def listing(items: list) -> str:
    return ", ".join(map(str, items)) or "none"


OPERATIONS = Table(
    [
        *(("model", "{model}"), ("operation", "{operation}")),
        *((f"{kernel}: {what}", f"{{{kernel}[{what}]}}") for kernel in KERNELS for what in ("rows", "batches")),
    ],
    f"Row counts (of {listing(list(ROWS))}) whose rows differ from the same rows among {COMPARED_WITH}, and batches"
    f" (lanes x rows, of {listing([f'{lanes} x {rows}' for lanes, rows in BATCHES])}) whose last lane differs from"
    " the same rows alone, in a model as loaded and in one loaded with `deterministic=True`.",
)
PLACES = Table(
    [
        *(("moved", "{check}"), ("dtype", "{dtype}"), ("places", "{places}"), ("that differ", "{differ}")),
        ("largest share of outputs that change", "{largest_share_of_outputs:.0%}"),
    ],
    f"`masked_attention` of a block's 8 rows behind {PREFIX} keys, moved about in its cache; compared with the"
    " block at slot 512, capacity 2048, alone. A split of the keys has 256 slots.",
)
PREFILLS = Table(
    [("model", "{model}"), ("prompt", "{prompt}"), *((kernel, f"{{{kernel}}}") for kernel in KERNELS)],
    "Prefill of one prompt, padded, alone (1 x) or beside longer ones; the batches that differ, by kernel. Padding"
    " on the left moves keys into other splits; the decoding loop has none.",
)
GROUPS = Table(
    [("kernel", "{kernel}"), ("sizes", "{sizes}")],
    "Sizes (of 1 to 64 rows) of an expert's group at which a row differs from the row in a group of 64.",
)
COST = Table(
    [
        ("rows", "{rows}"),
        *((f"{kernel} ms", f"{{ms[{name}]:.2f}}") for kernel, name in zip(KERNELS, COST_OF, strict=True)),
        *(("ratio", "{ratio:.2f}"), ("ratio of best", "{ratio_of_best:.2f}")),
    ],
    "What `deterministic=True` costs a forward of tiny-target: medians, interleaved; lower is better.",
)


def run(bench: Bench, seconds: float, models: list[str]) -> None:
    """`seconds`: of measuring per row count of the cost."""
    look_into(bench, load(models), seconds)


@torch.inference_mode()
def look_into(bench: Bench, loaded: dict[str, dict[str, LoadedModel]], seconds: float) -> None:
    for name, kernels in loaded.items():
        for both in zip(*(operations(kernels[kernel]) for kernel in KERNELS), strict=True):
            found = {kernel: measure_operation(one) for kernel, one in zip(KERNELS, both, strict=True)}
            differing = {kernel: {what: listing(which) for what, which in one.items()} for kernel, one in found.items()}
            bench.row(OPERATIONS, model=name, operation=both[0].name, **differing)
    for one in measure_places():
        bench.row(PLACES, **one, differ=len(one["that_differ"]))
    for name, kernels in loaded.items():
        found = {kernel: measure_prefill(model) for kernel, model in kernels.items()}
        for prompt in found[KERNELS[0]]:
            bench.row(
                PREFILLS, model=name, prompt=prompt, **{kernel: listing(found[kernel][prompt]) for kernel in found}
            )
    for kernel, model in loaded["random MoE"].items():
        bench.row(GROUPS, kernel=kernel, sizes=listing(measure_groups(model)))
    ordinary, deterministic = loaded["tiny-target"].values()
    for rows in COST_ROWS:
        tokens = random_tokens(ordinary.vocab_size, 1, rows)
        calls = {
            name: [lambda model=one.model, tokens=tokens: model(tokens, use_cache=False)]
            for name, one in zip(COST_OF, (ordinary, deterministic), strict=True)
        }
        taken = measure(calls, bench.device, seconds, least=10)
        ms = {name: one.us / 1e3 for name, one in taken.items()}
        best = {name: one.best_us / 1e3 for name, one in taken.items()}
        ratio, ratio_of_best = (of["deterministic"] / of["ordinary"] for of in (ms, best))
        bench.row(COST, rows=rows, ms=ms, best_ms=best, ratio=ratio, ratio_of_best=ratio_of_best)
