"""How large a plan is: a function of shapes alone, so that a compiler knows it."""

from __future__ import annotations

from torch import Tensor

SPLIT_KEYS = 256  # keys that one softmax runs over
GROUP_KEYS = 2048  # keys that the CUDA kernels add up by themselves before they add them to others


def words_of(backend: str, clock: Tensor, birth: Tensor, group: int) -> int:
    """Words (int32) of the plan that `backend` makes for clock [B, Lq], birth [B, Lk] and `group` query heads per KV
    head: the same number as of `plan_words` of the CUDA kernels (csrc/cuda/attention_plan.h)."""
    if backend != "cuda":
        return 0
    (batch, keys), rows = birth.shape, group * clock.shape[1]
    groups = batch * -(-keys // GROUP_KEYS)
    return 4 + 70 * groups * row_tiles(batch, rows, keys) + 128 * groups


def row_tiles(batch: int, rows: int, keys: int) -> int:
    """Of the CUDA kernels: of 64 packed rows, or of 128 where those fill a GPU. `rows`: of a KV head, packed."""
    few = batch * -(-keys // SPLIT_KEYS) * -(-rows // 128) < 16
    return -(-rows // (64 if rows <= 64 or few else 128))
