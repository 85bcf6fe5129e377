"""How large a plan is: a function of shapes alone, so that a compiler knows it."""

from __future__ import annotations

from torch import Tensor


def words_of(backend: str, clock: Tensor, birth: Tensor, group: int) -> int:
    """Words (int32) of the plan that `backend` makes for clock [B, Lq], birth [B, Lk] and `group` query heads per KV
    head. csrc/cuda/attention_plan.h says the same to the CUDA kernels."""
    return 0
