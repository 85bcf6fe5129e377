"""The compiled ops: those that are there where they serve this device, else built in place for it.

    python -m benchmarks.gpu.library cuda|cpu

prints as JSON what the compiled library says of itself and what keeps it from serving the device, null for nothing. It
is asked in a process of its own: a library that was loaded stays loaded, and one that crashes ends its process.
"""

from __future__ import annotations

import json
import sys

from .. import environment
from ..contest import Bench, in_one_line
from ..processes import Ran, run

ASKING = 60.0  # seconds: torch is imported, and a kernel runs


def build(bench: Bench) -> None:
    """The device and the library as they are, then a build if that is needed."""
    found = ask(bench)
    if found["obstacle"] is None:
        cells = {"result": "loads and runs a kernel here, nothing was built", "seconds": ""}
        bench.add({"case": "the library that was there", "cells": cells})
    elif bench.tiny:
        raise RuntimeError(f"{found['obstacle']}: build the C++ ops before a rehearsal (make setup)")
    else:
        bench.add({"case": "the library that was there", "cells": {"result": found["obstacle"], "seconds": ""}})
        compile_extension(bench)
        found = ask(bench)
        if found["obstacle"]:
            raise RuntimeError(f"built, but {found['obstacle']}")
    bench.machine = {"kernels": found["kernels"]}
    describe_device(bench)


def describe_device(bench: Bench) -> None:
    """nvidia-smi and `simsd_kernels.info` to the logs."""
    commands = {"nvidia-smi": ["nvidia-smi"], "info": [sys.executable, "-m", "simsd_kernels.info"]}
    for name, command in commands.items():
        run(command, max(min(20.0, bench.time_left()), 1.0), bench.logs / f"{name}.log")


def ask(bench: Bench) -> dict:
    command = [sys.executable, "-m", "benchmarks.gpu.library", bench.device.type]
    ran = run(command, max(min(ASKING, bench.time_left()), 1.0), bench.logs / "library.log")
    try:
        return json.loads(ran.said.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {"obstacle": f"the library could not be asked: exit status {ran.code}, {last_line(ran)}", "kernels": ""}


def compile_extension(bench: Bench) -> None:
    if lacking := environment.missing_for_build():
        raise RuntimeError(f"a build needs what this machine lacks: {'; '.join(lacking)}")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    variables = environment.build_variables()
    ran = run(command, max(bench.time_left() - 10, 5.0), bench.logs / "build.log", variables)
    cells = {"result": f"exit status {ran.code}", "seconds": f"{ran.seconds:.0f}"}
    bench.add({"case": f"{' '.join(command[1:])} for sm_{variables['SIMSD_CUDA_ARCHS']}", "cells": cells})
    if ran.code:
        print("\n".join(ran.said.splitlines()[-25:]), flush=True)
        raise RuntimeError(f"the build ended with status {ran.code}: {last_error(ran)}")


def last_error(ran: Ran) -> str:
    lines = [line.strip() for line in ran.said.splitlines() if "error" in line.lower()]
    return lines[-1][:200] if lines else last_line(ran)


def last_line(ran: Ran) -> str:
    lines = [line.strip() for line in ran.said.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "without a word"


def obstacle(kind: str) -> str | None:
    """What keeps the compiled library from serving a device of that kind ("cuda" or "cpu"); None for nothing."""
    import torch

    from simsd_kernels import dispatch, ops, thin_linear

    if absent := dispatch.load_library():
        return absent
    expected = [op for op in ops.SCHEMAS if kind != "cuda" or op not in ops.WITHOUT_CUDA]
    if lacking := [op for op in expected if dispatch.compiled_obstacle(op, kind.upper())]:
        return f"the library has no {kind} kernel for {', '.join(lacking)}"
    try:
        given = [torch.ones(rows, 16, dtype=torch.bfloat16, device=kind) for rows in (2, 32)]
        out = thin_linear(*given, backend=kind).cpu()
    except Exception as error:  # its machine code may be another GPU's
        return f"the library does not run here: {in_one_line(error)}"
    return None if bool((out == 16).all()) else "the library computes something else than it should: 1 x 16 is not 16"


def main(kind: str) -> int:
    print(json.dumps({"obstacle": obstacle(kind), "kernels": environment.kernels()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
