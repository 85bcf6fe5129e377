"""The host side of the CUDA ops, with a few lines of C++ in place of the CUDA runtime."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess

import pytest
from torch.utils import cpp_extension

from emulation import CUDA, FLAGS, ROOT

COMPILER = os.environ.get("CXX", "g++")
pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler: {COMPILER}")
HEADER = """
#pragma once
enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetDevice(int*);
cudaError_t cudaSetDevice(int);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int);
"""
SOURCE = """
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include "cuda/architectures.h"
#include "cuda/bindings/runtime.h"

static int current = 0;
static cudaError_t answer = cudaSuccess;
static bool torch_has_cuda = false;

const char* cudaGetErrorString(cudaError_t) { return "invalid device"; }
cudaError_t cudaGetDevice(int* device) { *device = current; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { current = device; return device == 0 ? cudaSuccess : answer; }
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaSuccess; }

extern "C" int stream_of(int, void** stream) { *stream = nullptr; return 0; }
extern "C" void* open_torch(const char*, int) noexcept { return torch_has_cuda ? &current : nullptr; }
extern "C" void* find_query(void*, const char*) noexcept { return reinterpret_cast<void*>(&stream_of); }

// Visits the device of a tensor that is not on the current one, 0. Returns the device while there, -100 for an error,
// and tells the device afterwards.
extern "C" int visit(bool has_cuda, bool fails, int* afterwards) {
    torch_has_cuda = has_cuda;
    answer = fails ? cudaErrorInvalidDevice : cudaSuccess;
    current = 0;
    int there = -100;
    try {
        const simsd::OnDevice device(torch::stable::empty({1}));  // the CPU's number is -1
        there = current;
    } catch (const std::exception&) {
    }
    *afterwards = current;
    return there;
}

extern "C" const char* named() {
    static const std::string text = simsd::architectures({800, 860, 900, 1000, 1210});
    return text.c_str();
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    (folder / "cuda_runtime_api.h").write_text(HEADER)
    (folder / "host.cpp").write_text(SOURCE)
    flags = [flag for flag in FLAGS.split() if flag != "-DSIMSD_EMULATE"]
    paths = [f"-I{folder}", f"-I{ROOT / 'csrc'}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    sources = [str(folder / "host.cpp"), str(CUDA / "bindings" / "runtime.cpp")]
    replaced = ["-Ddlopen=open_torch", "-Ddlsym=find_query"]
    torch_folders = [option for path in cpp_extension.library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries = [*torch_folders, "-lc10", "-ltorch_cpu", "-ltorch"]
    built = folder / "host.so"
    command = [COMPILER, "-shared", *flags, "-O0", *paths, *replaced, *sources, "-o", str(built), *libraries]
    subprocess.run(command, check=True)

    def load(name: str) -> ctypes.CDLL:
        """One of its own: the library asks torch only once."""
        return ctypes.CDLL(str(shutil.copy(built, folder / name)))

    return load


@pytest.mark.parametrize("torch_has_cuda, switch_fails", [(False, False), (True, True), (True, False)])
def test_the_current_device_is_as_before_whether_an_op_ran_or_threw(library, torch_has_cuda, switch_fails):
    afterwards = ctypes.c_int(-7)
    loaded = library(f"{torch_has_cuda}-{switch_fails}.so")
    there = loaded.visit(ctypes.c_bool(torch_has_cuda), ctypes.c_bool(switch_fails), ctypes.byref(afterwards))
    assert there == (-1 if torch_has_cuda and not switch_fails else -100)
    assert afterwards.value == 0


def test_a_gpu_without_kernels_is_told_what_this_build_holds(library):
    loaded = library("named.so")
    loaded.named.restype = ctypes.c_char_p
    assert loaded.named() == b"8.0, 8.6, 9.0, 10.0, 12.1"
