"""The ids that are never drawn, as a mask that is made once and read by every op that draws.

One bit an id, so that a kernel reads 19 KB beside a row of 151,936 logits, and finds 32 ids to be allowed at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BITS = 32  # ids of a word


def banned_mask(ids: Sequence[int] | Tensor, vocabulary: int, device: torch.device | str | None = None) -> Tensor:
    """The mask of banned ids that `sample_logits`, `block_verify`, `propose_block`, `plan_block` and `verify_graph`
    take. To be made once, for a model or a request: it looks at the ids, which waits for a GPU.

    Args:
        ids: which ids of the vocabulary are never drawn, in any order, repeated or not.
        vocabulary: V, how many ids the logits have.
        device: where the logits are; None: where `ids` is, the CPU for ids that are no tensor.

    Returns:
        int32 [ceil(V / 32)]; id i is banned where bit i % 32 of word i // 32 is set.

    Raises:
        TypeError: ids that are no integers. ValueError: an id outside [0, V), or no id that is left to draw.
    """
    if isinstance(vocabulary, bool) or not isinstance(vocabulary, int):
        raise TypeError(f"banned_mask: vocabulary must be an integer, got {vocabulary!r}")
    if vocabulary < 1:
        raise ValueError(f"banned_mask: vocabulary must be at least 1, got {vocabulary}")
    if isinstance(ids, Tensor):
        device = device or ids.device
        if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
            raise TypeError(f"banned_mask: ids must be integers, got {ids.dtype}")
        ids = ids.flatten().tolist()
    ids = set(ids)
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int):
            raise TypeError(f"banned_mask: ids must be integers, got {i!r}")
        if not 0 <= i < vocabulary:
            raise ValueError(f"banned_mask: ids must be in [0, {vocabulary}), got {i}")
    if len(ids) == vocabulary:
        raise ValueError(f"banned_mask: ids must leave one to draw, got all {vocabulary} of them")
    words = [0] * words_of(vocabulary)
    for i in ids:
        words[i // BITS] |= 1 << i % BITS
    signed = [word - 2**BITS if word >> BITS - 1 else word for word in words]
    return torch.tensor(signed, dtype=torch.int32, device=device)


def is_banned(banned: Tensor | None, vocabulary: int, device: torch.device) -> Tensor:
    """bool [V] of a mask on that device; None bans nothing."""
    if banned is None:
        return torch.zeros(vocabulary, dtype=torch.bool, device=device)
    bits = banned[:, None] >> torch.arange(BITS, dtype=torch.int32, device=device)
    return (bits & 1).bool().flatten()[:vocabulary]


def check_banned(op: str, banned: object, logits: object) -> None:
    """Raises TypeError or ValueError unless `banned` is None or a mask for these logits [..., V]; what else is wrong
    with logits is for others to say."""
    if banned is None or not isinstance(logits, Tensor) or 0 in (logits.dim(), *logits.shape[-1:]):
        return
    vocabulary = logits.shape[-1]
    words = words_of(vocabulary)
    is_mask = isinstance(banned, Tensor) and banned.dtype == torch.int32
    if is_mask and banned.dim() == 1 and banned.shape[0] == words:
        return
    given = f"{banned.dtype} {list(banned.shape)}" if isinstance(banned, Tensor) else type(banned).__name__
    raise (ValueError if is_mask else TypeError)(
        f"{op}: banned must be torch.int32 [{words}], as simsd_kernels.banned_mask(ids, {vocabulary}) makes it, got"
        f" {given}"
    )


def words_of(vocabulary: int) -> int:
    return (vocabulary + BITS - 1) // BITS
