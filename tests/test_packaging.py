"""The package as a user gets it: a wheel, with and without a C++ compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "csrc", "simsd_kernels", "python")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of what is built from, so that no build touches the working tree."""
    folder = tmp_path_factory.mktemp("sources")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    return folder


def build_wheel(sources: Path, out: Path, **environment: str) -> tuple[Path, str]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-v",
        "-w",
        str(out),
        str(sources),
    ]
    without_cuda = {"SIMSD_BUILD_CUDA": "0"}  # tests/test_cuda_build.py looks at that build, which takes minutes
    built = subprocess.run(command, capture_output=True, text=True, env=os.environ | without_cuda | environment)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("*.whl")), built.stdout + built.stderr


def install_and_attend(wheel: Path, folder: Path) -> str:
    """Unpacks the wheel and attends with it in a process that sees nothing of the checkout."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    code = (
        "import torch, simsd_kernels as s, simsd, pathlib\n"
        "v = s.Visibility.causal(5)\n"
        "q = torch.randn(1, 2, 5, 16)\n"
        "o = torch.ops.simsd.masked_attention(q, q, q, v.clock[None], v.birth[None], v.death[None])\n"
        "e = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)\n"
        "torch.testing.assert_close(o, e)\n"
        "assert pathlib.Path(s.__file__).is_relative_to(pathlib.Path.cwd()), s.__file__\n"
        "print(simsd.load('tiny-draft').name, s.dispatch.load_library())"
    )
    # -I keeps the checkout, PYTHONPATH and an editable install's folder off the path.
    start = f"import sys; sys.path.insert(0, {str(folder)!r}); exec({code!r})"
    ran = subprocess.run([sys.executable, "-I", "-c", start], capture_output=True, text=True, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_a_wheel_carries_the_ops_and_the_pair(sources, tmp_path):
    wheel, _ = build_wheel(sources, tmp_path / "wheels")
    assert "cp311-abi3" in wheel.name  # one binary for every Python >= 3.11
    assert install_and_attend(wheel, tmp_path / "site").strip() == "tiny-draft None"


def test_without_a_compiler_it_installs_pure_python_and_says_so(sources, tmp_path):
    # A PATH with Python alone: no c++, g++ or ninja.
    wheel, output = build_wheel(
        sources, tmp_path / "wheels", PATH=str(Path(sys.executable).parent), CXX="no-such-compiler"
    )
    assert "NO C++ COMPILER FOUND" in output
    assert "tiny-draft the package was installed without its C++ ops" in install_and_attend(wheel, tmp_path / "site")


NO_TOOLS = {"PATH": str(Path(sys.executable).parent), "CUDA_HOME": "", "CUDA_PATH": "", "SIMSD_BUILD_CUDA": "1"}
COMPILER = shutil.which("g++") or "g++"


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"SIMSD_BUILD_CUDA": "yes"}, "SIMSD_BUILD_CUDA='yes' is unknown: choose one of auto, 0, 1"),
        ({**NO_TOOLS, "CXX": COMPILER}, "SIMSD_BUILD_CUDA=1: no nvcc on PATH or under CUDA_HOME"),
        ({**NO_TOOLS, "CXX": "no-such-compiler"}, "SIMSD_BUILD_CUDA=1: no C++ compiler"),
        ({"SIMSD_BUILD_CUDA": "1", "SIMSD_CUDA_ARCHS": "sm_90"}, "SIMSD_CUDA_ARCHS='sm_90': give native, or a list"),
    ],
    ids=["unknown value", "no toolkit", "no compiler", "unknown GPU"],
)
def test_a_cuda_build_that_cannot_be_is_refused(sources, environment, message):
    if "SIMSD_CUDA_ARCHS" in environment and shutil.which("nvcc") is None:
        pytest.skip("needs nvcc on PATH")
    command = [sys.executable, "setup.py", "--version"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=sources, env=os.environ | environment)
    assert ran.returncode != 0 and message in ran.stderr
