"""The definition of `silu_mul`: act_fn(gate) * up of transformers' MLP, each step rounded as there.

In float64, so that the float32 it is rounded to is the nearest one, whatever exponential torch picks by an element's
place (its vector loops and what they leave over differ by a unit in the last place).
"""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels import dispatch


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `api.silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    with dispatch.without_autocast(gate.device):
        wide = gate.double().clamp(min=-1000.0)  # e^1000 is infinite, so -inf gives 0 as well
        silu = wide / (1.0 + (-wide).exp())
        return (silu.to(torch.promote_types(gate.dtype, torch.float32)).to(gate.dtype) * up).contiguous()
