"""Which backend serves a call, and what is said where none can. GPUs are asked for by name only: none is needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import simsd_kernels
from simsd_kernels import dispatch

OP = "store_kv"
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Makes it look as if there were a GPU of this compute capability, with these backends installed."""

    def pretend(capability: tuple[int, int] = (9, 0), cuda: bool = True, triton: bool = True) -> None:
        monkeypatch.delenv("SIMSD_BACKEND", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setitem(dispatch._compiled_obstacles, (OP, "CUDA"), None if cuda else "not compiled")
        monkeypatch.setattr(dispatch, "_HAS_TRITON", triton)
        monkeypatch.setattr(dispatch, "EMULATION", None)

    return pretend


def choose(backend: str | None = None, obstacle=lambda name: None) -> str:
    return dispatch.choose(OP, backend, GPU, obstacle)


@pytest.mark.parametrize(
    "cuda, triton, served",
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "triton"), (False, False, "reference")],
)
def test_on_a_gpu_compiled_comes_before_triton_before_reference(gpu, cuda, triton, served):
    gpu(cuda=cuda, triton=triton)
    assert choose() == served


def test_a_call_that_the_first_backend_cannot_serve_goes_to_the_next(gpu):
    gpu()
    assert choose(obstacle=lambda name: "supports head sizes ..." if name == "cuda" else None) == "triton"


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_gpu_too_old_is_told_what_is_supported_and_what_can_serve(gpu, backend):
    gpu(capability=(7, 5))
    assert choose() == "reference"
    with pytest.raises(RuntimeError) as error:
        choose(backend)
    assert f"{backend}: supports compute capability 8.0 (Ampere) and newer, got 7.5" in str(error.value)
    assert "reference: can serve this call" in str(error.value)


def test_an_explicit_backend_that_cannot_serve_lists_what_each_lacks(gpu):
    gpu(cuda=False)
    with pytest.raises(RuntimeError) as error:
        choose("cuda")
    assert str(error.value).splitlines() == [
        "store_kv: backend 'cuda' cannot serve this call.",
        "  reference: can serve this call",
        "  cpu: needs cpu tensors, got cuda",
        "  triton: can serve this call",
        "  cuda: not compiled",
    ]


@pytest.mark.parametrize("variable, source", [(None, "backend"), ("rocm", "SIMSD_BACKEND")])
def test_an_unknown_backend_is_refused_by_the_name_of_who_asked(monkeypatch, variable, source):
    if variable:
        monkeypatch.setenv("SIMSD_BACKEND", variable)
    with pytest.raises(ValueError, match=f"{source}='rocm' is unknown: choose one of reference, cpu, triton, cuda"):
        dispatch.choose(OP, None if variable else "rocm", torch.device("cpu"), lambda name: None)


def test_the_environment_insists_and_the_argument_insists_more(monkeypatch):
    monkeypatch.setenv("SIMSD_BACKEND", "reference")
    cpu = torch.device("cpu")
    assert dispatch.choose(OP, None, cpu, lambda name: None) == "reference"
    if dispatch.compiled_obstacle(OP, "CPU") is None and not dispatch.EMULATION:
        assert dispatch.choose(OP, "cpu", cpu, lambda name: None) == "cpu"


@pytest.mark.skipif(dispatch.EMULATION is not None, reason="the emulation takes CPU tensors")
def test_a_program_that_is_traced_may_assume_a_backend(monkeypatch):
    monkeypatch.setenv("SIMSD_BACKEND", "reference")
    with dispatch.assume("cuda"):
        assert choose(obstacle=lambda name: "cannot") == "cuda"
    assert choose() == "reference"


def test_cuda_refuses_tensors_of_the_cpu():
    cache = torch.zeros(1, 1, 2, 4)
    new, slots = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="cuda: needs cuda tensors, got cpu"):
        simsd_kernels.store_kv(new, new, cache, cache.clone(), slots, backend="cuda")


@pytest.fixture
def without_library(tmp_path, monkeypatch) -> Path:
    """A copy of the package as it is where no C++ compiler was found, first on the path of child processes."""
    package = tmp_path / "simsd_kernels"
    shutil.copytree(Path(dispatch.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("SIMSD_BACKEND", "SIMSD_LOG", "SIMSD_CUDA_EMULATION"):
        monkeypatch.delenv(name, raising=False)
    return package


IMPORT = "import torch, simsd_kernels\nx = torch.ones(1, 2)"
BY_FUNCTION = "simsd_kernels.thin_linear(x, x)"
BY_TORCH = "torch.ops.simsd.thin_linear(x, x)"
BY_TORCH_WITHOUT_X = "torch.ops.simsd.add_rms_norm(None, x, x[0], 1e-6)"  # the first argument tells no device


def stderr_of(*lines: str) -> list[str]:
    ran = subprocess.run([sys.executable, "-P", "-c", "\n".join(lines)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stderr.splitlines()


@pytest.mark.parametrize(
    "call", [BY_FUNCTION, BY_TORCH, BY_TORCH_WITHOUT_X], ids=["function", "torch.ops", "torch.ops, None first"]
)
def test_without_compiled_ops_the_first_call_says_so_once_and_what_to_do(without_library, call):
    (line,) = stderr_of(IMPORT, call, BY_FUNCTION, BY_TORCH)
    assert line.startswith(
        "simsd-kernels: the slow reference serves: the package was installed without its C++ ops"
        " (reinstall with a C++ compiler on PATH): `pip install --force-reinstall "
    )


def test_compiled_ops_that_do_not_load_are_said_with_the_loader_s_own_words(without_library):
    (without_library / "_C.abi3.so").write_text("not a library")
    (line,) = stderr_of(IMPORT, BY_TORCH)
    assert "the C++ ops do not load: " in line and "_C.abi3.so: file too short (reinstall to build them" in line


def test_nothing_is_said_at_import_nor_where_the_reference_was_asked_for(without_library, monkeypatch):
    assert stderr_of(IMPORT, "simsd_kernels.thin_linear(x, x, backend='reference')") == []
    monkeypatch.setenv("SIMSD_BACKEND", "reference")
    assert stderr_of(IMPORT, BY_FUNCTION, BY_TORCH) == []


@pytest.mark.skipif(dispatch.load_library() is not None, reason="needs the compiled ops")
def test_nothing_is_said_where_the_compiled_ops_pass_over_a_call():
    assert stderr_of(IMPORT, "simsd_kernels.thin_linear(x.double(), x.double())") == []


@pytest.mark.parametrize(
    "triton, numpy, obstacle",
    [
        ("3.6.0", "2.4.6", "the interpreter of Triton 3.6.0 needs numpy < 2.4, got 2.4.6: pip install 'numpy<2.4'"),
        ("3.6.0+git1a2b", "2.10.0", "the interpreter of Triton 3.6.0+git1a2b needs numpy < 2.4, got 2.10.0"),
        ("3.6.0", "2.3.5", None),
        ("3.7.1", "2.4.6", None),
        ("3.10.0", "3.0.0rc1", None),
        ("3.9.0", None, "Triton's interpreter needs numpy (pip install numpy)"),
    ],
)
def test_an_interpreter_that_cannot_run_says_in_one_line_what_it_needs(monkeypatch, triton, numpy, obstacle):
    found = dispatch.interpreter_obstacle(triton, numpy)
    assert found is None if obstacle is None else found.startswith(obstacle) and "\n" not in found
    monkeypatch.setattr(dispatch, "INTERPRETER_OBSTACLE", found)
    monkeypatch.setattr(dispatch, "_HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.device_obstacle("triton", OP, torch.device("cpu")) == found
