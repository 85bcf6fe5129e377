"""Which backend serves a call: the `backend=` argument, then `SIMSD_BACKEND`, then the first that can."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
from collections.abc import Callable, Iterator

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

_log = logging.getLogger("simsd.dispatch")
if "dispatch" in os.environ.get("SIMSD_LOG", "").split(","):
    _log.addHandler(logging.StreamHandler())
    _log.setLevel(logging.DEBUG)


@functools.cache
def load_library() -> str | None:
    """Loads the compiled ops once. Returns None, or why there are none."""
    path = next(pathlib.Path(__file__).parent.glob("_C*.so"), None)
    if path is None:
        return "the package was installed without its C++ ops (reinstall with a C++ compiler on PATH)"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        loaders = error.__cause__ or error  # torch's own message has the path alone
        return f"the C++ ops do not load: {loaders} (reinstall to build them for this torch and system)"
    return None


# pip keeps wheels that it has built: without --no-cache-dir the one without C++ ops would come back.
REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation simsd-kernels"


def note_reference(device: torch.device) -> None:
    """Says, once per process, that the reference serves by default, and why there are no compiled ops."""
    if device.type == "cpu" and not os.environ.get("SIMSD_BACKEND") and not torch.compiler.is_compiling():
        _note_missing_library()


@functools.cache
def _note_missing_library() -> None:
    if why := load_library():
        _log.warning(
            "simsd-kernels: the slow reference serves: %s: `%s` (in a checkout `.` for the name);"
            " SIMSD_BACKEND=reference silences this",
            why,
            REINSTALL,
        )


# A build of the CUDA kernels that runs them on the CPU (tests/emulation.py): backend "cuda" then takes CPU tensors.
EMULATION = os.environ.get("SIMSD_CUDA_EMULATION") or None

# (op, dispatch key) -> what keeps the compiled library from serving it. Filled at import: torch.compile can trace a
# dict look-up, but none of the questions asked to fill it.
_compiled_obstacles: dict[tuple[str, str], str | None] = {}
_operators: dict[tuple[str, str], torch._ops.OpOverload] = {}
_in_triton: set[str] = set()  # ops that have a Triton kernel


def probe(schemas: dict[str, str]) -> None:
    """Loads the compiled ops and notes what they and Triton implement."""
    _in_triton.update(op for op in schemas if (pathlib.Path(__file__).parent / op / "triton.py").exists())
    missing = load_library()
    for op in schemas:
        for key in ("CPU", "CUDA"):
            has = not missing and torch._C._dispatch_has_kernel_for_dispatch_key(f"simsd::{op}", key)
            reason = None if has else missing or f"the compiled library has no {key} kernel for this op"
            _compiled_obstacles[op, key] = reason
            _operators[op, key.lower()] = overload("simsd", op)
    if EMULATION:
        torch.ops.load_library(EMULATION)
        for op, schema in schemas.items():
            EMULATED.define(op + schema)
            has = torch._C._dispatch_has_kernel_for_dispatch_key(f"simsd_emulated::{op}", "CPU")
            _compiled_obstacles[op, "CUDA"] = None if has else "there is no CUDA kernel for this op"
            _operators[op, "cuda"] = overload("simsd_emulated", op)


EMULATED = torch.library.Library("simsd_emulated", "FRAGMENT")


def overload(namespace: str, op: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops, namespace), op).default


def operator(op: str, backend: str) -> torch._ops.OpOverload:
    """What serves `op` on the compiled backends "cpu" and "cuda"."""
    return _operators[op, backend]


def compiled_obstacle(op: str, key: str) -> str | None:
    """None where the compiled library implements `op` for dispatch key `key` ("CPU" or "CUDA"), else why not."""
    return _compiled_obstacles[op, key]


def has_triton(op: str) -> bool:
    """Whether there is a Triton kernel for `op`."""
    return op in _in_triton


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside, torch computes in the dtypes of what it is given, whatever `torch.autocast` surrounds the call."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


_HAS_TRITON = importlib.util.find_spec("triton") is not None


def triton_obstacle() -> str | None:
    """None where Triton can be imported, else why not."""
    return None if _HAS_TRITON else 'triton is not installed (pip install "simsd-kernels[triton]")'


MINIMUM_CAPABILITY = (8, 0)


def capability_obstacle(device: torch.device) -> str | None:
    """Why the kernels do not run on this GPU, None where they do (or where it cannot be asked)."""
    if device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_available():
        return None
    given = torch.cuda.get_device_capability(device)
    if given >= MINIMUM_CAPABILITY:
        return None
    return f"supports compute capability 8.0 (Ampere) and newer, got {given[0]}.{given[1]}: use backend='reference'"


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def interpreter_obstacle(triton: str, numpy: str | None) -> str | None:
    """What keeps Triton's interpreter of these versions from running kernels, None if nothing does."""
    if numpy is None:
        return "Triton's interpreter needs numpy (pip install numpy)"
    if _release(triton) < (3, 7) and _release(numpy) >= (2, 4):
        return f"the interpreter of Triton {triton} needs numpy < 2.4, got {numpy}: pip install 'numpy<2.4'"
    return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".")[:2])


def _installed_interpreter_obstacle() -> str | None:
    if not (_HAS_TRITON and interpreting()):
        return None
    import triton

    has_numpy = importlib.util.find_spec("numpy") is not None
    return interpreter_obstacle(triton.__version__, importlib.metadata.version("numpy") if has_numpy else None)


# Asked at import, like what is compiled.
INTERPRETER_OBSTACLE = _installed_interpreter_obstacle()


def device_obstacle(backend: str, op: str, device: torch.device) -> str | None:
    """What keeps `backend` from serving `op` on `device`, whatever the arguments; None if nothing does."""
    match backend:
        case "reference":
            return None
        case "cpu" | "cuda":
            if device.type != ("cpu" if EMULATION else backend):
                return f"needs {backend} tensors, got {device.type}"
            return compiled_obstacle(op, backend.upper()) or capability_obstacle(device)
        case "triton":
            if not has_triton(op):
                return "this op has no triton kernel"
            if obstacle := triton_obstacle():
                return obstacle
            if device.type == "cuda" or (device.type == "cpu" and interpreting()):
                return INTERPRETER_OBSTACLE or capability_obstacle(device)
            return f"needs cuda tensors (or TRITON_INTERPRET=1 set before import), got {device.type}"
    raise AssertionError(backend)


_assumed: str | None = None


@contextlib.contextmanager
def assume(backend: str) -> Iterator[None]:
    """Inside, `choose` takes `backend` for every op and asks nothing: for programs that are traced on fake tensors,
    where nothing runs."""
    global _assumed
    before, _assumed = _assumed, backend
    try:
        yield
    finally:
        _assumed = before


def choose(op: str, backend: str | None, device: torch.device, obstacle: Callable[[str], str | None]) -> str:
    """Returns the backend that serves this call.

    `obstacle(backend)` says why the arguments at hand keep a backend from serving (dtype, head size ...), or None;
    what depends on device and installation alone is checked here. Raises ValueError for an unknown name and
    RuntimeError, listing every backend, where an explicit choice cannot serve or nothing can.
    """

    def why_not(name: str) -> str | None:
        return device_obstacle(name, op, device) or obstacle(name)

    if _assumed is not None:
        return _assumed
    requested = backend or os.environ.get("SIMSD_BACKEND") or None
    if requested is not None:
        if requested not in BACKENDS:
            source = "backend" if backend else "SIMSD_BACKEND"
            raise ValueError(f"{source}={requested!r} is unknown: choose one of {', '.join(BACKENDS)}")
        candidates: tuple[str, ...] = (requested,)
    else:
        candidates = PREFERENCE.get(device.type, ("reference",))
    for name in candidates:
        reason = why_not(name)
        if reason is None:
            if requested is None and name == "reference":
                note_reference(device)
            return name
        if requested is None and not torch.compiler.is_compiling():
            _log.debug("%s: passing over %s: %s", op, name, reason)
    lines = [f"  {name}: {why_not(name) or 'can serve this call'}" for name in BACKENDS]
    raise RuntimeError(f"{op}: backend {requested or 'auto'!r} cannot serve this call.\n" + "\n".join(lines))


_chosen: dict[tuple[str, torch.device, str | None], str] = {}


def choose_for(op: str, device: torch.device) -> str:
    """`choose` by the device alone, asked once: for loops that call an op thousands of times a second."""
    if _assumed is not None:
        return _assumed
    key = op, device, os.environ.get("SIMSD_BACKEND")
    if key not in _chosen:
        _chosen[key] = choose(op, None, device, lambda backend: None)
    return _chosen[key]
