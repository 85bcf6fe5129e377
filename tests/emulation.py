"""Builds the CUDA kernels for the CPU, where every thread of a block is a fiber (csrc/cuda/emulation), and prints the
library's path:

    SIMSD_CUDA_EMULATION=$(python tests/emulation.py) pytest tests/ops tests/emulated

`--asan` builds with AddressSanitizer, whose runtime must be loaded first:

    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \\
        SIMSD_CUDA_EMULATION=$(python tests/emulation.py --asan) pytest tests/ops tests/emulated
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys

from torch.utils import cpp_extension

ROOT = pathlib.Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
FLAGS = "-std=c++20 -fPIC -Wall -Wno-unknown-pragmas -g1 -DSIMSD_EMULATE -DTORCH_TARGET_VERSION=0x020b000000000000"
RULES = """
rule compile
  command = {compiler} -MMD -MF $out.d {flags} -x c++ -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {compiler} -shared {sanitize} $in {libraries} -o $out
"""


def build(asan: bool, only: list[str]) -> pathlib.Path:
    folder = ROOT / "build" / "-".join(["emulation", *only, *(["asan"] if asan else [])])
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "simsd_emulated.so"
    # -O1 under AddressSanitizer: it compiles in half the time, and the tests wait for fibers anyway.
    optimise = "-O1 -fsanitize=address -fno-omit-frame-pointer" if asan else "-O2"
    system = (f"-isystem {path}" for path in cpp_extension.include_paths())
    flags = " ".join([FLAGS, optimise, f"-I{ROOT / 'csrc'}", *system])
    sources = sorted([*CUDA.glob("*.cu"), *CUDA.glob("bindings/*.cpp"), *CUDA.glob("emulation/*.cpp")])
    if unknown := set(only) - {path.stem for path in CUDA.glob("*.cu")}:
        known = ", ".join(sorted(path.stem for path in CUDA.glob("*.cu")))
        raise SystemExit(f"--only: no kernel {', '.join(sorted(unknown))}; there are {known}")
    if only:
        sources = [path for path in sources if path.stem in (*only, "runtime") or path.parent.name == "emulation"]
    objects = {source: folder / (str(source.relative_to(CUDA)).replace("/", "_") + ".o") for source in sources}
    sanitize = "-fsanitize=address" if asan else ""
    torch_folders = " ".join(f"-L{path} -Wl,-rpath,{path}" for path in cpp_extension.library_paths())
    libraries = f"{torch_folders} -lc10 -ltorch_cpu -ltorch -Wl,-z,defs"
    compiler = os.environ.get("CXX", "g++")
    rules = RULES.format(compiler=compiler, flags=flags, sanitize=sanitize, libraries=libraries)
    lines = [f"build {compiled}: compile {source}" for source, compiled in objects.items()]
    lines.append(f"build {library}: link {' '.join(map(str, objects.values()))}")
    (folder / "build.ninja").write_text("\n".join([rules, *lines]) + "\n")
    subprocess.run([sys.executable, "-m", "ninja", "--quiet", "-C", str(folder)], stdout=sys.stderr, check=True)
    return library


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the CUDA kernels for the CPU and print the library's path.")
    parser.add_argument("--asan", action="store_true", help="with AddressSanitizer")
    parser.add_argument("--only", nargs="+", default=[], metavar="KERNEL", help="these kernels alone, such as store_kv")
    arguments = parser.parse_args()
    print(build(arguments.asan, arguments.only))
