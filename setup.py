"""Builds `simsd_kernels/_C.abi3.so`: the C++ ops, and the CUDA ones where wanted, on torch's stable ABI.

One binary serves every torch >= 2.11 and Python >= 3.11. It has no PyInit: `torch.ops.load_library` loads it.
Without a C++ compiler the package installs as pure Python and everything runs on the `reference` backend.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

from setuptools import find_packages, setup

NEEDS_TORCH = (
    "simsd-kernels: building needs torch >= 2.11 in this environment, {}:"
    " pip install torch setuptools wheel ninja pybind11, then install again"
)
try:
    import torch
except ImportError as error:
    raise SystemExit(NEEDS_TORCH.format(f"which cannot import it ({error})")) from None
if torch.__version__ < (2, 11):
    raise SystemExit(NEEDS_TORCH.format(f"which has {torch.__version__}"))
from torch.utils import cpp_extension  # noqa: E402 (a CUDA build of torch speaks up here where there is no GPU)

ROOT = pathlib.Path(__file__).parent
WARNINGS = ["-Wno-maybe-uninitialized"]  # gcc 12 raises it inside its own AVX-512 header
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI as of torch 2.11


def sources(pattern):
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def say(message):
    print(f"simsd-kernels: {message}", file=sys.stderr, flush=True)


def long_description():
    """README.md for a page elsewhere: its links and pictures of files lead into the repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project["urls"]["Repository"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    to_file = r"\]\((?!https?:|#)([^)]+)\)"
    text = re.sub(r"(!\[[^\]]*)" + to_file, rf"\1]({repository}/raw/HEAD/\2)", text)
    return re.sub(to_file, rf"]({repository}/blob/HEAD/\1)", text)


def toolkit_root():
    """The CUDA toolkit of the nvcc at hand (which may be a wrapper script, so it is asked), or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None:
        return None
    asked = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", asked.stderr, re.MULTILINE)
    return os.path.realpath(top.group(1)) if top else None


def cuda_targets():
    """nvcc's options for the GPUs of SIMSD_CUDA_ARCHS: compute capabilities without the dot, or "native"."""
    wanted = os.environ.get("SIMSD_CUDA_ARCHS", "80;90;100;120;80+PTX")
    if wanted == "native":
        return ["-arch=native"]
    targets = []
    for arch in wanted.split(";"):
        if not re.fullmatch(r"\d+a?(\+PTX)?", arch):
            raise SystemExit(f"SIMSD_CUDA_ARCHS={wanted!r}: give native, or a list such as 80;90;120;80+PTX")
        number, _, ptx = arch.partition("+")
        targets.append(f"-gencode=arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}")
    return targets


def cuda_options():
    """Extra CppExtension arguments for the CUDA sources, {} where they are not to be built."""
    wanted = os.environ.get("SIMSD_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"SIMSD_BUILD_CUDA={wanted!r} is unknown: choose one of auto, 0, 1")
    if wanted == "0" or (wanted == "auto" and torch.version.cuda is None):
        return {}
    root = toolkit_root()
    if root is None and wanted == "1":
        raise SystemExit(
            "SIMSD_BUILD_CUDA=1: no nvcc on PATH or under CUDA_HOME; install the CUDA toolkit or set it to 0"
        )
    if root is None:
        say("NO nvcc FOUND on PATH or under CUDA_HOME: CUDA tensors are served by Triton (slower at a few ops).")
        return {}
    cpp_extension.CUDA_HOME = root  # torch leaves it None in its CPU builds
    return {
        "sources": sources("cuda/*.cu") + sources("cuda/bindings/*.cpp"),
        "include_dirs": [f"{root}/include"],
        "library_dirs": [f"{root}/lib64"],
        "libraries": ["cudart_static", "dl", "rt", "pthread"],
        "nvcc": ["-O3", "-std=c++20", "-Xfatbin=-compress-all", *cuda_targets()],
    }


def has_compiler():
    if "CXX" not in os.environ and shutil.which("c++") is None and shutil.which("g++"):
        os.environ["CXX"] = "g++"  # torch asks for c++, which not every system links to it
    return shutil.which(os.environ.get("CXX", "c++").split()[0]) is not None


def extensions():
    if not has_compiler():
        if os.environ.get("SIMSD_BUILD_CUDA") == "1":
            raise SystemExit("SIMSD_BUILD_CUDA=1: no C++ compiler found; install g++ or set CXX")
        say("NO C++ COMPILER FOUND. Installing pure Python: every op runs on the slow `reference` backend.")
        say("Install g++ (or set CXX) and install again to get the C++ ops.")
        return []
    cuda = cuda_options()
    say(f"building the C++ ops {'and the CUDA ops' if cuda else '(no CUDA ops)'}")
    return [
        cpp_extension.CppExtension(
            "simsd_kernels._C",
            sources("*.cpp") + sources("cpu/**/*.cpp") + cuda.get("sources", []),
            include_dirs=[str(ROOT / "csrc"), *cuda.get("include_dirs", [])],
            library_dirs=cuda.get("library_dirs", []),
            libraries=cuda.get("libraries", []),
            depends=sources("**/*.h") + sources("**/*.cuh"),
            extra_compile_args={"cxx": ["-O3", "-g0", "-Wall", *WARNINGS, TORCH_TARGET], "nvcc": cuda.get("nvcc", [])},
            extra_link_args=["-Wl,-z,defs"],
            py_limited_api=True,
        )
    ]


modules = extensions()
setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["simsd_kernels*"]) + find_packages("python", include=["simsd*"]),
    package_dir={"simsd": "python/simsd"},
    package_data={"simsd": ["py.typed", "pair/**/*.json", "pair/**/*.safetensors"], "simsd_kernels": ["py.typed"]},
    ext_modules=modules,
    cmdclass={"build_ext": cpp_extension.BuildExtension} if modules else {},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if modules else {},
)
