"""What a caller has switched on in torch, kept out of loading and decoding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Autocast is off and tensors are made on the CPU where no device is named, as in a process that set neither; also
    a decorator. Both are the thread's own, and as they were afterwards.

    The default dtype is the process's: set here, it would change under other threads. So every tensor of the loop is
    made with a dtype. How precise float32 products are (`torch.set_float32_matmul_precision`) stays the caller's
    choice, as the model's dtype is; a deterministic model on the CPU does not depend on it where transformers computes
    RoPE's angles element by element (5.17 does not).
    """
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
