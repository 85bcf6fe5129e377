"""Counts the instructions of the CUDA kernels' inner loops in the compiled library, and attention's bytes and blocks
(attention_counts.py).

Needs what cuda_resources needs, and no GPU. A loop is followed in the machine code on the way that its ordinary turn
takes (sass.py): which one that is, is said by how often some instructions come on it. An instruction that a predicate
turns off counts, as it takes its turn all the same.
"""

from __future__ import annotations

import dataclasses

from ..contest import Bench
from ..report import Table
from . import attention_counts, cuda_resources, sass

PHILOX = {r"IMAD\.WIDE\.U32": range(100, 400)}  # multiplications of the ten rounds, that of eight counters at least


@dataclasses.dataclass(frozen=True)
class Loop:
    """
    Attributes:
        kernel: as cuda_resources names it. what: a turn of its inner loop, by a warp.
        through: an opcode, as a regular expression, that each turn comes by once; counts: see `sass.shortest_loop`.
        ceilings: compute capability to the most instructions of a turn.
        before: what sm_90 took for the same work as of commit 7cdc1e3, of attention as of 4759be4, counted the same
            way; of `scan`, whose warps took one turn each, from the first instruction to the last.
    """

    kernel: str
    what: str
    through: str
    counts: dict[str, range]
    ceilings: dict[int, int]
    before: int


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


def attention(dtype: str, before: tuple[int, int, int]) -> list[Loop]:
    """`masked_attention`: from one tile of 32 keys that every row sees to the next, for the 16 rows of a warp and 128
    columns: 64 products, a weight for each of 16 scores, no rescaling, nothing read but the next tile, which is 32 rows
    of 256 bytes of K and of V, by 2, 4 or 8 warps."""
    loops, ceilings = [], dict.fromkeys(cuda_resources.TARGETS, 450)
    for warps, instructions in zip((2, 4, 8), before, strict=True):
        copies = 2 * 32 * 256 // 16 // (32 * warps)
        ordinary = {"HMMA": range(64, 65), r"MUFU\.EX2": range(16, 17), r"LDG\.": range(1)}
        ordinary[r"LDGSTS.*\.128"] = range(copies, copies + 1)
        for kernel in (f"intervals::attend_parts<{dtype}, 128>", f"intervals::attend_all<{dtype}, 128>"):
            loops.append(Loop(kernel, f"32 keys, {warps} warps", r"BAR\.SYNC", ordinary, ceilings, instructions))
    return loops


GREEDY, NOISE = (dict.fromkeys(cuda_resources.TARGETS, most) for most in (450, 900))
LOOPS = [
    *attention("Bfloat16", (552, 448, 396)),
    *attention("Float16", (552, 448, 396)),
    *scan("Bfloat16", 4, (840, 1752), {**GREEDY, 80: 650}, {**NOISE, 80: 1100}),  # sm_80 compares no bfloat16 in pairs
    *scan("Float16", 4, (840, 1752), GREEDY, NOISE),
    *scan("float", 8, (809, 1710), GREEDY, NOISE),
]


def count(capability: int) -> list[int | None]:
    """The instructions of a turn of each of LOOPS in the installed library; None where no turn is as it should be."""
    code = cuda_resources.machine_code(cuda_resources.compiled(), capability)
    blocks = {loop.kernel: sass.blocks(code[loop.kernel]) for loop in LOOPS}
    return [sass.shortest_loop(blocks[loop.kernel], loop.through, loop.counts) for loop in LOOPS]


def run(bench: Bench) -> None:
    counted = {capability: count(capability) for capability in cuda_resources.TARGETS}
    tabulate(bench, counted, cuda_resources.compiler(cuda_resources.compiled()))
    attention_counts.tabulate(bench)


def tabulate(bench: Bench, counted: dict[int, list[int | None]], release: str) -> None:
    bench.machine["compiler"] = f"CUDA {release}"
    of_targets = [(f"sm_{capability}", f"{{sm_{capability}[0]}} / {{sm_{capability}[1]}}") for capability in counted]
    table = Table([("kernel", "`{kernel}`"), ("a turn", "{what}"), *of_targets, ("sm_90 before", "{before}")])
    for number, loop in enumerate(LOOPS):
        cells = {f"sm_{cc}": (found[number], loop.ceilings[cc]) for cc, found in counted.items()}
        bench.row(table, kernel=loop.kernel, what=loop.what, before=loop.before, **cells)
