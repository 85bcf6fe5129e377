"""Compiles every Triton kernel for GPUs that need not be there and tabulates what each takes of one.

Registers and stack are ptxas's, spills are local loads and stores counted in the machine code, shared memory is
Triton's. Nothing here runs on a GPU: no figure says how fast a kernel is.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import pathlib
import re
import tempfile
from collections.abc import Iterable, Iterator

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from simsd_kernels import dispatch
from simsd_kernels.add_rms_norm import triton as norm
from simsd_kernels.block_verify import triton as verify
from simsd_kernels.combine_experts import triton as combine
from simsd_kernels.grouped_linear import triton as grouped
from simsd_kernels.masked_attention import triton as attention
from simsd_kernels.masked_attention_backward import triton as backward
from simsd_kernels.qk_norm_rope_store import triton as rope
from simsd_kernels.sample_logits import triton as sample
from simsd_kernels.silu_mul import triton as silu
from simsd_kernels.sort_by_expert import triton as sort
from simsd_kernels.store_kv import triton as store
from simsd_kernels.thin_linear import triton as thin

from ..contest import Bench
from ..report import Table
from .cuda_resources import run_tool

# Compute capability -> shared memory that one program may have, in bytes (CUDA programming guide, technical
# specifications per compute capability).
TARGETS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
HEAD_SIZES = (64, 128, 256)
HIDDEN_SIZES = (160, 1024, 4096, 5120)  # a row in one warp, in some, in the most; in two passes
EXPERTS = 128
PAGE = 16  # keys per page: the least, which no tile of keys fits in


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel as the host wrapper would launch it: types of the pointers (None: no tensor), constants, options."""

    label: str
    module: object
    kernel: str
    pointers: dict[str, str | None]
    constants: dict[str, int | str]
    options: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Resources:
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    products: list[str]  # kinds of instructions on tensor cores


def variants() -> Iterator[Variant]:
    """Every kernel in every configuration that is shipped."""
    vectors = dict.fromkeys(("p_clock", "p_birth", "p_death", "p_kv_len", "p_table", "p_keys", "p_bounds"), "i32")
    for page in (0, PAGE):
        pointers = vectors if page else vectors | {"p_table": None}
        for tile in (32, 64):
            constants = {"TILE": tile, "SPLIT": attention.SPLIT, "QUERIES": attention.QUERIES, "PAGE": page}
            case = f"int32, tile {tile}" + f", pages of {page}" * bool(page)
            yield Variant(case, attention, "summarise", pointers, constants, dict(attention.EXACT))
    for dtype, name in NAMES.items():
        for dim in HEAD_SIZES:
            yield from attention_variants(dtype, name, dim)
            yield from backward_variants(dtype, name, dim)
            yield from cache_variants(name, dim)
        yield from sample_variants(name)
        yield from verify_variants(name)
        yield from layer_variants(name)
        for weight, pointers in weights(name).items():
            for case, configuration in products(dtype, weight).items():
                yield Variant(f"{name}, linear{weight}{case}", thin, "multiply", pointers, *configuration)
        yield from expert_variants(dtype, name)
    pointers = {"p_experts": "i64", **dict.fromkeys(("p_offsets", "p_rows", "p_places"), "i32")}
    yield Variant("experts", sort, "place_choices", pointers, {"BLOCK": sort.BLOCK}, sort.OPTIONS)


def weights(name: str) -> dict[str, dict[str, str | None]]:
    """What follows in a label to the pointers of a product."""
    pointers = dict.fromkeys(("p_x", "p_weight", "p_out"), name)
    return {"": pointers | {"p_scale": None}, ", int8": pointers | {"p_weight": "i8", "p_scale": "fp32"}}


def products(dtype: torch.dtype, weight: str) -> dict[str, tuple[dict[str, int], dict[str, int]]]:
    """What follows in a label to the configuration of a product."""
    of_weight = torch.int8 if weight else dtype
    few, many = (thin.configuration(dtype, rows, 4096, of_weight) for rows in (16, 2048))
    return {"": few} if few == many else {"": few, ", many rows": many}


def attention_variants(dtype: torch.dtype, name: str, dim: int) -> Iterator[Variant]:
    tiles, options = attention.configuration(dim, dtype)
    inputs = {"p_q": name, "p_k": name, "p_v": name, "p_clock": "i32", "p_keys": "i32", "p_bounds": "i32"}
    partials = {"p_max": "fp32", "p_sum": "fp32", "p_acc": "fp32"}
    tiles = {**tiles, "n_dim": dim}
    options = {**options, **attention.EXACT}
    case = f"{name}, D {dim}"
    for page in (0, PAGE):
        paged = {**tiles, "PAGE": page}
        of_pages = case + f", pages of {page}" * bool(page)
        yield Variant(of_pages, attention, "attend_few_rows", {**inputs, **partials}, paged, options)
        scan = {**paged, "SCAN": attention.TILES_SCANNED}
        yield Variant(of_pages, attention, "attend_many_rows", {**inputs, "p_out": name}, scan, options)
    combined = {**tiles, "ROWS": attention.COMBINED_ROWS}
    yield Variant(case, attention, "combine_splits", {**partials, "p_out": name}, combined, dict(attention.EXACT))


def backward_variants(dtype: torch.dtype, name: str, dim: int) -> Iterator[Variant]:
    tiles, options = backward.configuration(dim, dtype)
    pointers = dict.fromkeys(("p_dout", "p_q", "p_k", "p_v", "p_out", "p_dq", "p_dk", "p_dv"), name)
    pointers |= dict.fromkeys(("p_clock", "p_keys", "p_bounds"), "i32")
    pointers |= dict.fromkeys(("p_log_sum", "p_delta"), "fp32")
    for kernel, more in (("row_gradients", {}), ("key_gradients", backward.KEY_OPTIONS)):
        yield Variant(f"{name}, D {dim}", backward, kernel, pointers, {**tiles, "n_dim": dim}, {**options, **more})


def cache_variants(name: str, dim: int) -> Iterator[Variant]:
    caches = dict.fromkeys(("p_k", "p_v", "p_k_cache", "p_v_cache"), name) | {"p_slots": "i32"}
    sizes = {**store.configuration(dim), "n_dim": dim}
    yield Variant(f"{name}, D {dim}", store, "scatter_rows", caches, sizes, store.OPTIONS)
    pointers = caches | dict.fromkeys(("p_q", "p_q_weight", "p_k_weight", "p_cos", "p_sin", "p_out"), name)
    sizes = {**rope.configuration(dim), "n_dim": dim, "n_rotary": dim}
    yield Variant(f"{name}, D {dim}", rope, "norm_rope_store", pointers, sizes, rope.OPTIONS)


def layer_variants(name: str) -> Iterator[Variant]:
    pointers = dict.fromkeys(("p_x", "p_residual", "p_weight", "p_out"), name)
    for dim in HIDDEN_SIZES:
        constants, options = norm.configuration(dim)
        yield Variant(f"{name}, D {dim}", norm, "add_norm", pointers, {**constants, "n_dim": dim}, options)
    pointers = dict.fromkeys(("p_gate_up", "p_out"), name)
    yield Variant(f"{name}, layer", silu, "silu_times", pointers, {"BLOCK": silu.BLOCK}, silu.OPTIONS)


def expert_variants(dtype: torch.dtype, name: str) -> Iterator[Variant]:
    for weight, pointers in weights(name).items():
        pointers = {**pointers, "p_offsets": "i32"}
        for case, (tiles, options) in products(dtype, weight).items():
            constants = {**tiles, "EXPERTS": EXPERTS}
            label = f"{name}, experts{weight}{case}"
            yield Variant(label, grouped, "multiply_groups", pointers, constants, options)
    pointers = {**dict.fromkeys(("p_y", "p_weights", "p_out"), name), "p_places": "i32"}
    yield Variant(f"{name}, experts", combine, "add_choices", pointers, {"BLOCK": combine.BLOCK}, combine.OPTIONS)


def sample_variants(name: str) -> Iterator[Variant]:
    """With everything on; what `block_verify` launches of these kernels is less, but for the rows it leaves out."""
    pointers = {
        "p_logits": name, "p_banned": "i32", "p_known": "i32", "p_drafted": "i64", "p_temperature": "fp32",
        "p_top_k": "i32", "p_top_p": "fp32", "p_seed": "i64", "p_position": "i32", "p_revealed": "i64",
        "p_cutoff": "i32", "p_stats": "fp32", "p_ids": "i32", "p_token": "i64",
    }  # fmt: skip
    pointers |= dict.fromkeys(("p_prob", "p_log_odds", "p_entropy", "p_logsumexp", "p_draw_logprob"), "fp32")
    sweep = {"LANES": sample.SWEEP_LANES}
    yield Variant(name, sample, "find_cutoffs", pointers, sweep, sample.SWEEP_OPTIONS)
    yield Variant(name, sample, "scan_chunks", pointers, {"CHUNK": sample.CHUNK}, sample.OPTIONS)
    rows = {"ROWS": sample.ROWS_AT_ONCE, "CHUNKS": sample.CHUNKS_AT_ONCE}
    yield Variant(name, sample, "finish_rows", pointers, rows, sample.OPTIONS)


def verify_variants(name: str) -> Iterator[Variant]:
    for rule in ("match", "mrs"):
        draft = name if rule == "mrs" else None
        pointers = {
            "p_target": name, "p_draft": draft, "p_banned": "i32", "p_stats": "fp32",
            "p_ids": "i32", "p_cutoff": "i32", "p_draft_stats": draft and "fp32", "p_draft_tops": draft and "i32",
            "p_draft_cutoff": draft and "i32", "p_draft_ids": "i64", "p_known": "i32", "p_drafted": "i64",
            "p_temperature": "fp32", "p_coin": draft and "fp32", "p_residual": "fp32", "p_accepted": "i32",
            "p_bonus": "i64", "p_tokens": "i64", "p_target_ids": "i64", "p_prob": "fp32",
            "p_draw_logprob": "fp32", "p_stop": "i32",
            "p_rejected": "fp32", "p_mass": "fp64",
        }  # fmt: skip
        for kernel in ("judge",) + ("weigh_residual", "draw_residual") * (rule == "mrs"):
            # blocks of up to 64 positions, vocabularies of up to 2**18 ids
            chunks = verify.CHUNKS_AT_ONCE if kernel == "judge" else 64
            sizes = {"CHUNK": verify.CHUNK, "NOISY": rule == "match", "LENGTH": 64, "CHUNKS": chunks}
            yield Variant(f"{name}, {rule}", verify, kernel, pointers, sizes, verify.OPTIONS)


def source(variant: Variant) -> ASTSource:
    """The kernel specialised as for contiguous tensors: unit inner strides, everything else a multiple of 16."""
    kernel = getattr(variant.module, variant.kernel)
    signature, constants, attributes = {}, {}, {}
    sizes = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    inner = re.compile(
        r"stride_(\w+_d|\w+_v|clock_q|birth_k|death_k|kv_len|weight_k|scale_n|offsets_e|experts_c|y_n|weights_c|places_c)$"
    )
    for i, name in enumerate(kernel.arg_names):
        if name in variant.constants or name.startswith("p_") and variant.pointers[name] is None:
            signature[name], constants[i,] = "constexpr", variant.constants.get(name)
        elif name.startswith("p_"):
            signature[name], attributes[i,] = "*" + variant.pointers[name], [["tt.divisibility", 16]]
        elif inner.match(name):
            signature[name], constants[i,] = "constexpr", 1
        elif name in ("scale", "eps"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name not in sizes:
                attributes[i,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def measure(variant: Variant, capability: int) -> Resources:
    if dispatch.interpreting():
        raise RuntimeError("kernels cannot be compiled in a process with TRITON_INTERPRET=1")
    compiled = triton.compile(source(variant), target=GPUTarget("cuda", capability, 32), options=variant.options)
    with tempfile.TemporaryDirectory() as folder:
        binary = pathlib.Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = run_tool("cuobjdump", "--dump-resource-usage", binary)
        code = run_tool("nvdisasm", "-c", binary)
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    stack = int(found["STACK"]) + int(found["LOCAL"])
    products = sorted(set(re.findall(r"\b(?:mma\.sync|wgmma|tcgen05\.mma)\b", compiled.asm["ptx"])))
    return Resources(int(found["REG"]), stack, spills, compiled.metadata.shared, products)


def _measure_by_number(number: int, capability: int) -> Resources:
    return measure(list(variants())[number], capability)


def measure_all(numbers: Iterable[int], workers: int = 2) -> dict[tuple[int, int], Resources]:
    """(place in variants(), compute capability) -> resources; compiled in `workers` processes."""
    jobs = [(number, capability) for number in numbers for capability in TARGETS]
    context = multiprocessing.get_context("spawn")  # Triton's compiler does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return dict(zip(jobs, pool.map(_measure_by_number, *zip(*jobs, strict=True)), strict=True))


def run(bench: Bench, workers: int, kernels: str) -> None:
    """`workers`: processes that compile; `kernels`: only those whose name contains this."""
    every = list(variants())
    numbers = [number for number, variant in enumerate(every) if kernels in variant.kernel]
    results = measure_all(numbers, workers)
    bench.machine["compiler"] = f"Triton {triton.__version__}"
    columns = [("kernel", "{kernel}"), ("case", "{case}"), ("warps", "{warps}")]
    for capability in TARGETS:
        form = f"{{sm_{capability}[registers]}} / {{sm_{capability}[shared_kib]:.1f}}{{sm_{capability}[more]}}"
        columns.append((f"sm_{capability}", form))
    for number in numbers:
        variant = every[number]
        cells = {f"sm_{capability}": shown(results[number, capability]) for capability in TARGETS}
        about = {"kernel": variant.kernel, "case": variant.label, "warps": variant.options.get("num_warps", 4)}
        bench.row(Table(columns), **about, **cells)


def shown(r: Resources) -> dict:
    more = f" / {r.spills} spills, {r.stack_bytes} B" if r.spills or r.stack_bytes else ""
    return dataclasses.asdict(r) | {"shared_kib": r.shared_bytes / 1024, "more": more}
