"""What this run stands on: what is missing for it, and what a result must say of where it was taken.

Nothing here imports torch before it is asked to: a machine without torch gets a message, too.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "build" / "benchmarks"  # logs and what a benchmark has so far; not kept by git
PACKAGES = {  # what is imported, and the least version where one is asked for
    "torch": (2, 11),
    "triton": (3, 6),
    "transformers": (5, 17),
    "safetensors": None,
    "tokenizers": None,
    "numpy": None,
    "pytest": None,
    "hypothesis": None,
}
UNNEEDED = {"gpu": (), "rehearsal": ("triton",), "cpu": ("triton", "pytest", "hypothesis")}  # of them, by what is run
MINIMUM_CAPABILITY = (8, 0)


def toolkit() -> str | None:
    """The folder whose bin/ holds nvcc, or None."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home:
            return home if shutil.which("nvcc", path=f"{home}/bin") else None
    if found := shutil.which("nvcc"):
        return str(Path(found).parent.parent)
    return "/usr/local/cuda" if shutil.which("nvcc", path="/usr/local/cuda/bin") else None


def build_variables() -> dict[str, str]:
    """Environment for setup.py; nvcc on PATH is left for it to find (it may be a wrapper script).

    The GPU is named: nvcc's own `-arch=native` falls back to an old one where it cannot ask the driver.
    """
    import torch

    major, minor = torch.cuda.get_device_capability()
    variables = {"SIMSD_BUILD_CUDA": "1", "SIMSD_CUDA_ARCHS": f"{major}{minor}"}
    if shutil.which("nvcc") is None and (home := toolkit()):
        variables["CUDA_HOME"] = home
    return variables


def versions() -> dict[str, str | None]:
    """Package to version, None where it is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def missing(kind: str = "gpu") -> list[str]:
    """What keeps a GPU's benchmarks, a "rehearsal" of them, or the "cpu"'s from running here, a few words each; empty
    where nothing does."""
    found, gpu = [], kind == "gpu"
    for name, given in versions().items():
        if name in UNNEEDED[kind]:
            continue
        least = PACKAGES[name]
        wanted = f"{name} >= {'.'.join(map(str, least))}" if least else name
        if given is None:
            found.append(f"{wanted} (not installed)")
        elif least and given != "unknown" and tuple(int(n) for n in re.findall(r"\d+", given)[:2]) < least:
            found.append(f"{wanted} (found {given})")
    if gpu and versions()["torch"] is not None:
        found += _missing_device()
    if gpu and not has_library():
        found += missing_for_build()
    return found


def has_library() -> bool:
    """Whether compiled ops lie in the tree; whether they serve here, the benchmark `build` finds out."""
    return any((ROOT / "simsd_kernels").glob("_C*.so"))


def missing_for_build() -> list[str]:
    found = [] if importlib.util.find_spec("setuptools") else ["setuptools (not installed)"]
    if importlib.util.find_spec("ninja") is None and shutil.which("ninja") is None:
        found.append("ninja (not installed)")
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None and shutil.which("g++") is None:
        found.append("a C++ compiler (g++, or CXX)")
    if toolkit() is None:
        found.append("nvcc, the CUDA toolkit's compiler (looked on PATH, under CUDA_HOME and in /usr/local/cuda)")
    return found


def _missing_device() -> list[str]:
    import torch

    if torch.version.cuda is None:
        return [f"a CUDA build of torch (found {torch.__version__}, a CPU build)"]
    if not torch.cuda.is_available():
        return [f"a CUDA GPU (torch {torch.__version__} sees none)"]
    capability = torch.cuda.get_device_capability()
    if capability < MINIMUM_CAPABILITY:
        return [f"compute capability 8.0 or newer (found {capability[0]}.{capability[1]})"]
    return []


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def commit(told: str | None = None) -> dict[str, object]:
    """The commit and whether anything that git tracks differs from it; what is `told`, without git or its folder."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    unknown = {"commit": told or "unknown", "dirty": "unknown"}
    try:
        changes, head = git("status", "--porcelain", "--untracked-files=no"), git("rev-parse", "--short=12", "HEAD")
        return unknown if "unknown" in (changes, head) else {"commit": head, "dirty": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return unknown


def machine(told_commit: str | None = None) -> dict[str, object]:
    """CPU, GPU, driver, versions and build, as plain JSON types."""
    import torch

    from simsd_kernels import dispatch, info

    cpu, no_library = info.collect()["cpu"], dispatch.load_library()
    described: dict[str, object] = {
        "date": today(),
        **commit(told_commit),
        "cpu": cpu["name"],
        "cores": cpu["cores"],
        "instruction_set": torch.ops.simsd._cpu_capability() if no_library is None else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none (CPU build)",
        **{name: given or "not installed" for name, given in versions().items() if name != "torch"},
        "nvcc": _nvcc_release(),
        "driver": "none",
        "gpu": "none (CPU)",
        "kernels": kernels(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        described |= {
            "gpu": properties.name,
            "driver": _driver(),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
        }
    return described


def own(seconds: float) -> dict[str, object]:
    """What a process on the CPU has of the machine: its threads, the load beside it, how fast a product of 2048 x 2048
    is, by the best in `seconds`."""
    import torch

    from . import timing

    load, size = round(os.getloadavg()[0], 1), 2048
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = timing.measure({"product": [lambda: a @ b]}, torch.device("cpu"), seconds)["product"].best_us
    rate = round(2 * size**3 / best / 1e3)
    return {"threads": torch.get_num_threads(), "load_average": load, "matrix_product_gflops": rate}


def _nvcc_release() -> str:
    home = toolkit()
    if home is None:
        return "not found"
    try:
        said = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    release = re.search(r"release ([\d.]+)", said)
    return release.group(1) if release else "unknown"


def _driver() -> str:
    try:
        version = Path("/proc/driver/nvidia/version").read_text()
        return re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", version).group(1)
    except (OSError, AttributeError):
        pass
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def kernels() -> object:
    """What the compiled library says of itself, or why there is none."""
    try:
        import torch

        from simsd_kernels import dispatch, ops

        absent = dispatch.load_library()
        if absent:
            return absent
        built = json.loads(torch.ops.simsd._build_info())
        built["cuda_ops"] = [op for op in ops.SCHEMAS if dispatch.compiled_obstacle(op, "CUDA") is None]
        return built
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def slug(name: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"
