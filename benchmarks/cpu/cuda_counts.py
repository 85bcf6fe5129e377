"""Counts the instructions of the CUDA kernels' inner loops in the compiled library, and the work of whole launches
(linear_counts.py, filter_counts.py, attention_counts.py).

Needs what cuda_resources needs, and no GPU. A loop is followed in the machine code on the way that its ordinary turn
takes (sass.py): which one that is, is said by how often some instructions come on it. An instruction that a predicate
turns off counts, as it takes its turn all the same.
"""

from __future__ import annotations

import dataclasses

from ..contest import Bench
from ..report import Table
from . import attention_counts, cuda_resources, filter_counts, linear_counts, sass

PHILOX = {r"IMAD\.WIDE\.U32": range(100, 400)}  # multiplications of the ten rounds, that of eight counters at least


@dataclasses.dataclass(frozen=True)
class Loop:
    """
    Attributes:
        kernel: as cuda_resources names it. what: a turn of its inner loop, or some, by a warp.
        through: an opcode, as a regular expression, that each turn comes by once; counts: see `sass.shortest_loop`.
        ceilings: compute capability to the most instructions of a turn.
        before: what sm_90 took for the same work as of commit 7cdc1e3, of attention as of 4759be4, counted the same
            way; of `scan`, whose warps took one turn each, from the first instruction to the last. None
            where there was no such kernel.
    """

    kernel: str
    what: str
    through: str
    counts: dict[str, range]
    ceilings: dict[int, int]
    before: int | None


def scan(dtype: str, loads: int, before: tuple[int, int], greedy: dict[int, int], noise: dict[int, int]) -> list[Loop]:
    """`sample_logits`: from one segment's result to the next one's. An ordinary turn loads the next segment past the L1
    cache, 16 bytes at a time, reads nothing again, finds three numbers of a warp and makes a weight of each id."""
    one = range(loads, loads + 1)
    ordinary = {r"LDG\.E\.NA": one, r"LDG\.E\.(128|U16)": range(1), "C?REDUX": range(3, 4), r"MUFU\.EX2": range(32, 34)}
    kernel, through = f"sample::scan<{dtype}>", r"STG\.E\.128"
    return [
        Loop(kernel, "1,024 ids, greedy", through, ordinary, greedy, before[0]),
        Loop(kernel, "1,024 ids, noise", through, {**ordinary, **PHILOX}, noise, before[1]),
    ]


def product(tile: str, work: str, matrices: int, copies: int, before: int | None, most: dict[int, int]) -> Loop:
    """`thin_linear`, with so many products on tensor cores and 16-byte copies of a lane in the work."""
    counts = {"HMMA": range(matrices, matrices + 1), "LDGSTS": range(copies, copies + 1)}
    return Loop(f"linear::{tile}, linear::Params>", work, "LDGDEPBAR", counts, most, before)


def attention(dtype: str, before: tuple[int, int, int]) -> list[Loop]:
    """`masked_attention`: from one tile of 32 keys that every row sees to the next, for the 16 rows of a warp and 128
    columns: 64 products, a weight for each of 16 scores, no rescaling, nothing read but the next tile, which is 32 rows
    of 256 bytes of K and of V, by 2, 4 or 8 warps."""
    loops = []
    for warps, instructions in zip((2, 4, 8), before, strict=True):
        copies = 2 * 32 * 256 // 16 // (32 * warps)
        ordinary = {"HMMA": range(64, 65), r"MUFU\.EX2": range(16, 17), r"LDG\.": range(1)}
        ordinary[r"LDGSTS.*\.128"] = range(copies, copies + 1)
        for kernel in (f"intervals::attend_parts<{dtype}, 128>", f"intervals::attend_all<{dtype}, 128>"):
            loops.append(Loop(kernel, f"32 keys, {warps} warps", r"BAR\.SYNC", ordinary, alike(450), instructions))
    return loops


def alike(most: int) -> dict[int, int]:
    return dict.fromkeys(cuda_resources.TARGETS, most)


INT8 = "linear::Int8Weight<Bfloat16>"  # 16 operations of a lane for every 8 bytes that become bfloat16
GREEDY, NOISE = alike(450), alike(900)
LOOPS = [
    *attention("Bfloat16", (552, 448, 396)),
    *attention("Float16", (552, 448, 396)),
    *scan("Bfloat16", 4, (840, 1752), {**GREEDY, 80: 650}, {**NOISE, 80: 1100}),  # sm_80 compares no bfloat16 in pairs
    *scan("Float16", 4, (840, 1752), GREEDY, NOISE),
    *scan("float", 8, (809, 1710), GREEDY, NOISE),
    product("multiply<Bfloat16, 1, 1, true", "K 128: 8 rows x 16 columns", 8, 12, 322, alike(210)),
    product("multiply<Bfloat16, 2, 2, true", "K 128: 16 x 32", 32, 24, 664, alike(300)),
    product("multiply<Bfloat16, 8, 2, true", "K 128: 64 x 32", 128, 48, 1260, alike(560)),
    product(
        "multiply_wide<Bfloat16, linear::WideTile<1, 4, 4, 2>", "K 256: a fourth of 32 x 128", 128, 40, 1760, alike(520)
    ),
    product(
        "multiply_wide<Bfloat16, linear::WideTile<2, 2, 4, 2>", "K 256: a fourth of 64 x 64", 128, 32, 1260, alike(520)
    ),
    product(
        "multiply_wide<Bfloat16, linear::WideTile<2, 2, 4, 4>", "K 256: a fourth of 64 x 128", 256, 48, 2520, alike(800)
    ),
    product(
        "multiply_wide<Bfloat16, linear::WideTile<4, 2, 4, 4>",
        "K 256: an eighth of 128 x 128",
        256,
        32,
        2520,
        alike(800),
    ),
    product(f"multiply<{INT8}, 1, 1, true", "K 128: 8 rows x 16 columns", 8, 8, None, alike(360)),
    product(f"multiply<{INT8}, 2, 2, true", "K 128: 16 x 32", 32, 16, None, alike(680)),
    product(f"multiply<{INT8}, 8, 2, true", "K 128: 64 x 32", 128, 40, None, alike(850)),
    product(
        f"multiply_wide<{INT8}, linear::WideTile<2, 2, 4, 4>", "K 256: a fourth of 64 x 128", 256, 32, None, alike(2100)
    ),
    product(
        f"multiply_wide<{INT8}, linear::WideTile<4, 2, 4, 4>",
        "K 256: an eighth of 128 x 128",
        256,
        24,
        None,
        alike(2100),
    ),
]


@dataclasses.dataclass(frozen=True)
class Flight:
    """A kernel that moves bytes and does little else, with what it needs to reach an H100's bandwidth.

    Attributes:
        threads: of a block, at the size of SDAR-8B. loads: of 16 bytes, of a thread, before it uses one.
        before: `loads` as of commit 7cdc1e3.
    """

    kernel: str
    threads: int
    loads: int
    before: int


FLIGHTS = [
    Flight("layer::add_norm<Bfloat16, 8, 2, true>", 256, 6, 3),
    Flight("activation::silu_times<Bfloat16, true>", 128, 2, 2),
]
LEAST_BYTES = 32 * 1024  # in flight on a multiprocessor: 3.35 TB/s for 1.3 us, on each of 132
REGISTERS, THREADS = 65536, 2048  # of an sm_90's multiprocessor


def flights() -> list[tuple[int, int]]:
    """Of each of FLIGHTS on sm_90: its loads, and the bytes in flight of as many blocks as have room."""
    path = cuda_resources.compiled()
    code, resources = cuda_resources.machine_code(path, 90), cuda_resources.measure(path, 90)
    found = []
    for flight in FLIGHTS:
        loads = sass.loads_in_flight(code[flight.kernel])
        registers = -(-resources[flight.kernel].registers // 8) * 8
        blocks = min(REGISTERS // (registers * flight.threads), THREADS // flight.threads)
        found.append((loads, loads * 16 * flight.threads * blocks))
    return found


def count(capability: int) -> list[int | None]:
    """The instructions of a turn of each of LOOPS in the installed library; None where no turn is as it should be."""
    code = cuda_resources.machine_code(cuda_resources.compiled(), capability)
    blocks = {loop.kernel: sass.blocks(code[loop.kernel]) for loop in LOOPS}
    return [sass.shortest_loop(blocks[loop.kernel], loop.through, loop.counts) for loop in LOOPS]


def run(bench: Bench) -> None:
    counted = {capability: count(capability) for capability in cuda_resources.TARGETS}
    products, filtered = (cuda_resources.emulated(f"{what}_counts") for what in ("linear", "filter"))
    release = cuda_resources.compiler(cuda_resources.compiled())
    tabulate(bench, counted, flights(), products, filtered, release)
    attention_counts.tabulate(bench)


def tabulate(
    bench: Bench,
    counted: dict[int, list[int | None]],
    in_flight: list[tuple[int, int]],
    products: list[dict],
    filtered: list[dict],
    release: str,
) -> None:
    bench.machine["compiler"] = f"CUDA {release}"
    of_targets = [(f"sm_{capability}", f"{{sm_{capability}[0]}} / {{sm_{capability}[1]}}") for capability in counted]
    table = Table([("kernel", "`{kernel}`"), ("a turn", "{what}"), *of_targets, ("sm_90 before", "{before}")])
    for number, loop in enumerate(LOOPS):
        cells = {f"sm_{cc}": (found[number], loop.ceilings[cc]) for cc, found in counted.items()}
        bench.row(table, kernel=loop.kernel, what=loop.what, before=loop.before or "-", **cells)
    columns = [("kernel", "`{kernel}`"), ("16-byte loads of a thread", "{loads}"), ("before", "{before}")]
    table = Table([*columns, ("KiB per multiprocessor", "{kib:.0f}")], "In flight on an sm_90, before one is used")
    for flight, (loads, size) in zip(FLIGHTS, in_flight, strict=True):
        bench.row(table, kernel=flight.kernel, loads=loads, before=flight.before, kib=size / 1024)
    for figures in products:
        bench.row(linear_counts.TABLE, **figures)
    for found in filtered:
        bench.row(filter_counts.TABLE, **found)
