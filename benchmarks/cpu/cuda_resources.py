"""Reads from the compiled library what each CUDA kernel takes of each GPU.

Needs a library that was built with CUDA (SIMSD_BUILD_CUDA=1 SIMSD_CUDA_ARCHS unset) and no GPU. Registers and stack are
ptxas's; spills are local loads and stores counted in the machine code; shared memory is what the host asks for
(cuda_shapes.py). No figure says how fast a kernel is.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import TypeVar

from triton.backends import nvidia

import simsd_kernels

from ..contest import Bench
from ..environment import ROOT
from ..report import Table

T = TypeVar("T")
TOOLS = pathlib.Path(nvidia.__file__).parent / "bin"
TARGETS = (80, 90, 100, 120)
SHARED_BYTES = 99 * 1024  # that a block may have on all of them: sm_120's (CUDA programming guide)


@dataclasses.dataclass(frozen=True)
class Resources:
    registers: int
    stack_bytes: int
    spills: int
    matrix_instructions: int  # HMMA: products on the tensor cores


def library() -> pathlib.Path | None:
    return next(pathlib.Path(simsd_kernels.__file__).parent.glob("_C*.so"), None)


def contents(path: pathlib.Path) -> tuple[list[int], list[int]]:
    """Compute capabilities of the machine code and of the PTX in the library."""
    command = [TOOLS / "cuobjdump", "--list-elf", "--list-ptx", path]
    listing = subprocess.run(command, capture_output=True, text=True).stdout  # it fails where there is no device code
    return tuple(sorted(set(map(int, re.findall(rf"\.sm_(\d+)\.{kind}", listing)))) for kind in ("cubin", "ptx"))


def compiled() -> pathlib.Path:
    """The installed library. RuntimeError where it has no CUDA kernels."""
    path = library()
    if path is None or not contents(path)[0]:
        raise RuntimeError(
            "no CUDA kernels in the installed library: install with SIMSD_BUILD_CUDA=1 and a CUDA toolkit"
        )
    return path


def measure(path: pathlib.Path, capability: int) -> dict[str, Resources]:
    """Kernel, as C++ writes it, to what it takes."""
    found = {}
    for symbol, (text, instructions) in _disassembled(path, capability).items():
        numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
        found[symbol] = Resources(
            registers=int(numbers["REG"]),
            stack_bytes=int(numbers["STACK"]) + int(numbers["LOCAL"]),
            spills=len(re.findall(r"\b(?:LDL|STL)\b", instructions)),
            matrix_instructions=len(re.findall(r"\bHMMA\b", instructions)),
        )
    return _by_name(found)


def machine_code(path: pathlib.Path, capability: int) -> dict[str, str]:
    """Kernel, as C++ writes it, to its instructions as nvdisasm prints them."""
    return _by_name({symbol: code for symbol, (_, code) in _disassembled(path, capability).items()})


@functools.cache
def _disassembled(path: pathlib.Path, capability: int) -> dict[str, tuple[str, str]]:
    """Symbol of each kernel to the line of what it takes, and to its machine code."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for binary in extract(path, f"sm_{capability}", folder):
            usage = run_tool("cuobjdump", "--dump-resource-usage", binary)
            code = _instructions(run_tool("nvdisasm", "-c", binary))
            found |= {symbol: (text, code[symbol]) for symbol, text in re.findall(r"Function (\S+):\n(.*)", usage)}
    return found


def _by_name(found: dict[str, T]) -> dict[str, T]:
    """What was found by symbol, by the kernels' names, in their order."""
    names = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True).stdout
    short = (re.sub(r"\(anonymous namespace\)::|\(simsd::.*|^void |simsd::", "", name) for name in names.splitlines())
    return dict(sorted(zip(short, found.values(), strict=True)))


def shared_memory() -> dict[str, int]:
    """Kernel to the bytes of shared memory that a block of it takes at most."""
    return emulated("benchmarks.cpu.cuda_shapes")


def emulated(module: str) -> dict | list:
    """The JSON that a program of ours prints where the CUDA kernels run on the CPU."""
    build = [sys.executable, str(ROOT / "tests" / "emulation.py")]
    library = subprocess.run(build, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    ran = subprocess.run(
        [sys.executable, "-m", module], cwd=ROOT,
        env=os.environ | {"SIMSD_CUDA_EMULATION": library}, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return json.loads(ran.stdout)


def compiler(path: pathlib.Path) -> str:
    """The CUDA release that compiled the library, such as "13.0"."""
    with tempfile.TemporaryDirectory() as folder:
        binary = extract(path, "all", folder)[0].read_bytes()
    return re.search(rb"Cuda compilation tools, release ([\d.]+)", binary).group(1).decode()


def extract(path: pathlib.Path, name: str, folder: str) -> list[pathlib.Path]:
    """The binaries in the library whose name holds `name`, written to `folder`."""
    command = [TOOLS / "cuobjdump", "--extract-elf", name, path]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return sorted(pathlib.Path(folder).glob("*.cubin"))


def _instructions(disassembly: str) -> dict[str, str]:
    """Symbol to its machine code."""
    parts = re.split(r"^\s*\.section\s+\.text\.([^,\s]+).*$", disassembly, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def run_tool(tool: str, *arguments: object) -> str:
    return subprocess.run([TOOLS / tool, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def run(bench: Bench) -> None:
    path = compiled()
    results = {capability: measure(path, capability) for capability in TARGETS}
    tabulate(bench, results, shared_memory(), compiler(path))


def tabulate(bench: Bench, results: dict[int, dict[str, Resources]], shared: dict[str, int], release: str) -> None:
    bench.machine["compiler"] = f"CUDA {release}"
    columns = [("kernel", "`{kernel}`")]
    for capability in results:
        form = f"{{sm_{capability}[registers]}} / {{sm_{capability}[matrix_instructions]}}{{sm_{capability}[more]}}"
        columns.append((f"sm_{capability}", form))
    table = Table([*columns, ("shared memory", "{shared:.1f}")])
    for kernel in next(iter(results.values())):
        cells = {f"sm_{capability}": shown(part[kernel]) for capability, part in results.items()}
        bench.row(table, kernel=kernel, **cells, shared=shared[kernel] / 1024)


def shown(r: Resources) -> dict:
    more = f" / {r.stack_bytes} B stack, {r.spills} spills" if r.stack_bytes or r.spills else ""
    return dataclasses.asdict(r) | {"more": more}
