"""The package as a user gets it: its metadata, its sdist, and its wheel with and without a C++ compiler."""

from __future__ import annotations

import email
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import distribution as build
import simsd_kernels
from simsd_kernels import dispatch, info, ops

ROOT = build.ROOT
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WITHOUT_CUDA = {"SIMSD_BUILD_CUDA": "0"}  # tests/test_cuda_build.py looks at that build, which takes minutes
needs_auditwheel = pytest.mark.skipif(
    importlib.util.find_spec("auditwheel") is None, reason='needs pip install "simsd-kernels[release]"'
)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return build.build_sdist(tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def sources(sdist, tmp_path_factory) -> Path:
    """The unpacked sdist."""
    return build.unpack(sdist, tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the sdist, but for the compiled ops: those of this installation save the minutes of another build."""
    if missing := dispatch.load_library():
        pytest.skip(missing)
    sources, out = build.unpack(sdist, tmp_path_factory.mktemp("to_build")), tmp_path_factory.mktemp("wheel")
    setup = (sys.executable, "setup.py", "-q")
    build.run(*setup, "build_py", cwd=sources, env=os.environ | WITHOUT_CUDA)
    (package,) = sources.glob("build/lib*/simsd_kernels")
    shutil.copy(next(Path(simsd_kernels.__file__).parent.glob("_C*.so")), package)
    build.run(*setup, "bdist_wheel", "--skip-build", "-d", str(out), cwd=sources, env=os.environ | WITHOUT_CUDA)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def published(wheel, tmp_path_factory) -> Path:
    """The wheel as it is uploaded, where there is what that takes."""
    if importlib.util.find_spec("auditwheel") is None:
        return wheel
    return build.repair(wheel, tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def python(published, tmp_path_factory) -> Path:
    """The interpreter of a fresh virtual environment with the wheel in it."""
    return build.install(published, tmp_path_factory.mktemp("fresh") / "environment")


def test_a_fresh_environment_has_every_op_compiled_and_the_built_in_models(python):
    report = build.attempt(python)
    assert {op: backends["cpu"] for op, backends in report["ops"].items()} == dict.fromkeys(ops.SCHEMAS, info.AVAILABLE)
    assert report["installed_version"] == report["version"] == simsd_kernels.__version__


def test_the_sdist_s_tests_pass_with_the_wheel(sources, python):
    few = ["tests/test_docs.py", "tests/test_noise.py", "tests/ops/test_store_kv.py", "-k", "not example"]
    # -P keeps the sdist's own packages, which have no compiled ops, off the path.
    command = [python, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *few]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository")
def test_the_sdist_holds_every_file_of_the_repository(sources):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [name for name in tracked.stdout.splitlines() if not (sources / name).exists()] == []


def test_no_built_file_gets_into_the_sdist(sdist):
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert [name for name in names if name.endswith((".so", ".pyc"))] == []


@needs_auditwheel
def test_one_manylinux_wheel_serves_every_python_and_carries_no_library_of_torch(published):
    assert re.fullmatch(r"simsd_kernels-[\d.]+-cp311-abi3-manylinux_2_\d+_\w+\.whl", published.name)
    with zipfile.ZipFile(published) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
    assert libraries == ["simsd_kernels/_C.abi3.so"]


def test_type_checkers_read_both_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert {"simsd/py.typed", "simsd_kernels/py.typed"} <= set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_string(archive.read(name).decode("utf-8"))


def test_the_page_on_pypi_says_whose_it_is_and_where_to_turn(metadata):
    urls = dict(entry.split(", ", 1) for entry in metadata.get_all("Project-URL"))
    assert set(urls) == {"Repository", "Issues", "Changelog", "Paper"}
    assert metadata["Author"] and metadata["Keywords"] and metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    changes = urls["Changelog"].removeprefix(f"{urls['Repository']}/blob/HEAD/")
    assert f"## [{metadata['Version']}]" in (ROOT / changes).read_text(encoding="utf-8")


def test_links_and_pictures_of_the_page_on_pypi_lead_to_files_of_the_repository(metadata):
    page, repository = metadata.get_payload(), PROJECT["urls"]["Repository"]
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", page)
    assert len(links) == len(re.findall(r"\]\(", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert all(target.startswith("https://") for _, target in links)
    to_files = [(picture, target) for picture, target in links if target.startswith(repository)]
    assert ("!", f"{repository}/raw/HEAD/docs/mask.svg") in to_files
    for picture, target in to_files:
        path = target.removeprefix(f"{repository}/{'raw' if picture else 'blob'}/HEAD/")
        assert (ROOT / path).exists(), target


def test_every_hint_to_install_an_extra_names_one_of_this_distribution_and_suits_every_shell():
    hints = {}
    for path in (*ROOT.glob("simsd_kernels/**/*.py"), *ROOT.glob("python/**/*.py"), *ROOT.glob("*.md")):
        for hint in re.findall(r"pip install (\S?[\w-]+\[[\w,]+\]\S?)", path.read_text(encoding="utf-8")):
            hints.setdefault(hint, path)
    allowed = {f'"{PROJECT["name"]}[{extra}]"' for extra in PROJECT["optional-dependencies"]}  # zsh wants the quotes
    assert hints and set(hints) <= allowed, hints


def test_without_a_compiler_it_installs_pure_python_and_says_so(sources, tmp_path):
    # A PATH with Python alone: no c++, g++ or ninja.
    path = str(Path(sys.executable).parent)
    pure, output = build.build_wheel(sources, tmp_path / "wheel", PATH=path, CXX="no-such-compiler", **WITHOUT_CUDA)
    assert "NO C++ COMPILER FOUND" in output
    report = build.attempt(build.install(pure, tmp_path / "environment"))
    assert report["ops"]["reveal"]["cpu"].startswith("the package was installed without its C++ ops")


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


@pytest.mark.parametrize(
    "pretend, why",
    [
        ("sys.modules['torch'] = None", "which cannot import it (import of torch halted; None in sys.modules)"),
        ("import torch; torch.__version__ = type(torch.__version__)('2.10.1')", "which has 2.10.1"),
    ],
    ids=["none", "too old"],
)
def test_an_environment_without_a_torch_to_build_with_is_told_in_one_line(sources, pretend, why):
    code = f"import runpy, sys; {pretend}; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=sources)
    assert ran.returncode == 1
    assert ran.stderr.splitlines() == [
        f"simsd-kernels: building needs torch >= 2.11 in this environment, {why}:"
        " pip install torch setuptools wheel ninja pybind11, then install again"
    ]
