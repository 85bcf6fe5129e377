"""What this installation can do: `python -m simsd_kernels.info [--json]`.

Nothing is asked of any device until `collect` runs, and no question can make it fail: what cannot be found out is
reported as the reason in words.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Callable

import torch

import simsd_kernels
from simsd_kernels import dispatch, ops

AVAILABLE = "available"
INSTRUCTION_SETS = ("sse4_2", "avx", "fma", "f16c", "avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


def collect() -> dict:
    """Everything that `info` prints, as plain JSON types."""
    gpus = _ask(_gpus)
    return {
        "version": simsd_kernels.__version__,
        "running_with": {
            "python": platform.python_version(),
            "platform": _ask(platform.platform),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda or "none (CPU build)",
            **{name: _ask(lambda name=name: _version(name)) for name in ("triton", "transformers", "numpy")},
        },
        "built_with": _ask(_built_with),
        "cpu": {
            "name": _ask(_cpu_name),
            "cores": os.cpu_count(),
            "threads": _ask(torch.get_num_threads),
            "instruction_sets": _ask(_instruction_sets),
            "used_by_torch": _ask(torch.backends.cpu.get_cpu_capability),
        },
        "gpus": gpus,
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("SIMSD_")},
        "ops": {op: {backend: _ask(lambda o=op, b=backend: _status(o, b, gpus)) for backend in dispatch.BACKENDS}
                for op in ops.SCHEMAS},
    }  # fmt: skip


def _ask(question: Callable[[], object]) -> object:
    try:
        return question()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _built_with() -> dict | str:
    return dispatch.load_library() or json.loads(torch.ops.simsd._build_info())


def _cpu_name() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _instruction_sets() -> list[str]:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return [name for name in INSTRUCTION_SETS if name in flags.split()]
    return []


def _gpus() -> list[dict]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


def _status(op: str, backend: str, gpus: object) -> str:
    """AVAILABLE, or why `backend` cannot serve `op` here on the device it is made for."""
    device = torch.device("cuda" if backend in ("triton", "cuda") else "cpu")
    if backend == "triton" and dispatch.interpreting():
        device = torch.device("cpu")
    if obstacle := dispatch.device_obstacle(backend, op, device):
        return obstacle
    return "no CUDA GPU at hand" if device.type == "cuda" and not gpus else AVAILABLE


def render(report: dict) -> str:
    """The report as text: facts line by line, then a table of ops and backends, then every reason once."""
    lines = [f"simsd-kernels {report['version']}"]
    for title, name in (("running with", "running_with"), ("built with", "built_with"), ("cpu", "cpu")):
        lines += ["", title, *_facts(report[name])]
    lines += ["", "gpus"]
    gpus = report["gpus"]
    if isinstance(gpus, str):
        lines.append(f"  {gpus}")
    for gpu in gpus if isinstance(gpus, list) else []:
        lines.append(
            f"  {gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['memory_gib']} GiB, "
            f"{gpu['multiprocessors']} multiprocessors"
        )
    if not gpus:
        lines.append("  none")
    if report["environment"]:
        lines += ["", "environment", *_facts(report["environment"])]

    width = max(map(len, report["ops"]))
    lines += ["", "  ".join(["ops".ljust(width), *(name.ljust(9) for name in dispatch.BACKENDS)]).rstrip()]
    reasons: dict[str, list[str]] = {}
    for op, backends in report["ops"].items():
        cells = ["yes" if status == AVAILABLE else "no" for status in backends.values()]
        lines.append("  ".join([op.ljust(width), *(cell.ljust(9) for cell in cells)]).rstrip())
        for backend, status in backends.items():
            if status != AVAILABLE:
                reasons.setdefault(f"{backend}: {status}", []).append(op)
    if reasons:
        lines += ["", "why not"]
    for reason, affected in reasons.items():
        everywhere = len(affected) == len(report["ops"])
        lines.append(f"  {reason}" + ("" if everywhere else f" [{', '.join(affected)}]"))
    return "\n".join(lines)


def _facts(facts: dict | str) -> list[str]:
    if not isinstance(facts, dict):
        return [f"  {facts}"]
    width = max(map(len, facts), default=0)
    return [
        f"  {name.replace('_', ' ').ljust(width)}  {' '.join(value) if isinstance(value, list) else value}"
        for name, value in facts.items()
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m simsd_kernels.info", description="What this installation can do.")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    report = collect()
    print(json.dumps(report, indent=2) if parser.parse_args(arguments).json else render(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
