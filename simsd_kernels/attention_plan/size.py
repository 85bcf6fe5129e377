"""How large a plan is: a function of shapes alone, so that a compiler knows it."""

from __future__ import annotations

from torch import Tensor


def words_of(backend: str, clock: Tensor, birth: Tensor, group: int) -> int:
    """Words (int32) of the plan that `backend` makes for clock [B, Lq], birth [B, Lk] and `group` query heads per KV
    head. csrc/cuda/attention_plan.h says the same to the CUDA kernels."""
    if backend != "cuda":
        return 0
    rows, keys = group * clock.shape[1], birth.shape[1]
    row_tiles = -(-rows // (64 if rows <= 64 else 128))
    key_groups = clock.shape[0] * -(-keys // 2048)
    return 4 + 70 * key_groups * row_tiles + 128 * key_groups
