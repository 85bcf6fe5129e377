"""`.ci/environment.py`, by which `make demo` and `make test` use the torch that is there."""

import os
import pathlib
import subprocess
import venv

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PINNED = (ROOT / "constraints.txt").read_text().splitlines()


def interpreter(folder: pathlib.Path, torch: str | None, triton: str | None = None) -> pathlib.Path:
    """A virtual environment's Python that has these versions, as far as packaging tools and `import` can tell."""
    venv.create(folder)
    (site_packages,) = folder.glob("lib/python3*/site-packages")
    for name, version in (("torch", torch), ("triton", triton)):
        if version is not None:
            info = site_packages / f"{name}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            (site_packages / f"{name}.py").write_text(f"__version__ = {version!r}\n")
    return folder / "bin" / "python"


def make(python: pathlib.Path, environment: pathlib.Path, *constraints: str) -> tuple[str, list[str]]:
    """What is printed, and the constraints of the environment made."""
    command = [python, ".ci/environment.py", environment, *constraints]
    # This test's own PYTHONPATH must not show the interpreters a torch.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    return done.stdout, (environment / "constraints.txt").read_text().splitlines()


def imported(environment: pathlib.Path, module: str) -> str:
    code = f"import {module}; print({module}.__version__)"
    return subprocess.run([environment / "bin/python", "-c", code], capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("torch", ["2.11.0+cu130", "2.13.0+cpu"])
def test_the_torch_of_an_interpreter_that_is_a_virtual_environment_is_used(tmp_path, torch):
    python = interpreter(tmp_path / "users", torch, triton="3.6.0")
    said, constraints = make(python, tmp_path / "ours")
    assert f"torch {torch}" in said and "as it is" in said
    assert (imported(tmp_path / "ours", "torch"), imported(tmp_path / "ours", "triton")) == (torch, "3.6.0")
    assert [line for line in constraints if line.startswith(("torch=", "triton="))] == [
        f"torch=={torch}",
        "triton==3.6.0",
    ]
    # torch 2.11 wants setuptools < 82: a pinned newer one would have pip replace torch.
    assert not any(line.startswith("setuptools") for line in constraints)
    assert "pytest" in " ".join(constraints)


def test_pip_leaves_that_torch_where_it_is(tmp_path):
    python = interpreter(tmp_path / "users", "2.11.0+cu130")
    make(python, tmp_path / "ours")
    pip = [tmp_path / "ours/bin/python", "-m", "pip", "install", "--no-index", "-c", tmp_path / "ours/constraints.txt"]
    done = subprocess.run([*pip, "torch>=2.11"], capture_output=True, text=True)
    assert done.returncode == 0 and "already satisfied: torch" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("torch", [None, "2.10.1"])
def test_without_a_usable_torch_the_pinned_versions_are_installed(tmp_path, torch):
    said, constraints = make(interpreter(tmp_path / "users", torch), tmp_path / "ours")
    assert constraints == PINNED
    assert imported(tmp_path / "ours", "torch") == ""
    assert (f"torch {torch}" in said and "older than 2.11" in said) if torch else said == ""


def test_given_constraints_stand_whatever_torch_is_there(tmp_path):
    _, constraints = make(interpreter(tmp_path / "users", "2.13.0"), tmp_path / "ours", ".ci/oldest.txt")
    assert "torch==2.11.0" in constraints and "transformers==5.17.0" in constraints
    assert imported(tmp_path / "ours", "torch") == ""


def test_the_oldest_versions_are_those_that_the_package_asks_for():
    declared = (ROOT / "pyproject.toml").read_text()
    oldest = (ROOT / ".ci/oldest.txt").read_text()
    for package in ("torch", "triton", "transformers"):
        version = oldest.split(f"{package}==")[1].split()[0]
        assert f'"{package}>={version.removesuffix(".0")}"' in declared, package
