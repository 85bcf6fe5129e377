"""Attention masks as three int32 vectors: `visible(i, j) <=> birth[j] <= clock[i] <= death[j]`.

A key is born and dies; a query looks at one moment. Every mask of the field is such an interval test, so no kernel
builds, stores or reads an Lq x Lk mask. A dead key has birth INF, a dead query has clock -1.

`Visibility` holds one mask, with a constructor per family. The rows of the SimSD layouts, for a decoding loop to
concatenate, come from `simsd_kernels.rows` and can be imported from here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simsd_kernels import validate
from simsd_kernels.rows import (
    INF,
    KNOWN,
    NEVER,
    Rows,
    check_blocks,
    clean_rows,
    concatenate,
    copy_rows,
    stride_for,
    temporal_rows,
)

__all__ = [
    "INF",
    "KNOWN",
    "NEVER",
    "Rows",
    "Visibility",
    "check_blocks",
    "clean_rows",
    "concatenate",
    "copy_rows",
    "stride_for",
    "temporal_rows",
]


@dataclass(frozen=True, eq=False)
class Visibility:
    """One attention mask: query i sees key j iff `birth[j] <= clock[i] <= death[j]`.

    clock: int32 [Lq] or [B, Lq]. birth, death: int32 [Lk] or [B, Lk], batched iff clock is.
    """

    clock: Tensor
    birth: Tensor
    death: Tensor

    def __post_init__(self) -> None:
        vectors = {"clock": self.clock, "birth": self.birth, "death": self.death}
        for name, value in vectors.items():
            validate.tensor("Visibility", name, value)
            validate.dtype("Visibility", name, value, torch.int32)
            if value.dim() not in (1, 2):
                raise ValueError(f"Visibility: {name} must be [L] or [B, L], got {list(value.shape)}")
        if self.birth.shape != self.death.shape or self.clock.shape[:-1] != self.birth.shape[:-1]:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in vectors.items())
            raise ValueError(
                f"Visibility: clock must be [Lq] with birth and death [Lk], or [B, Lq] with [B, Lk], got {shapes}"
            )
        validate.same_device("Visibility", **vectors)

    @classmethod
    def bidirectional(cls, n: int) -> Visibility:
        """Every one of n tokens sees every other."""
        zero = torch.zeros(_count("bidirectional", "n", n), dtype=torch.int32)
        return cls(zero, zero.clone(), torch.full_like(zero, INF))

    @classmethod
    def causal(cls, n: int) -> Visibility:
        """Token i sees tokens 0 .. i."""
        return cls(*clean_rows(_positions("causal", n), 1))

    @classmethod
    def sliding_window(cls, n: int, w: int) -> Visibility:
        """Token i sees the last w tokens up to itself."""
        position = _positions("sliding_window", n)
        death = position.long() + _count("sliding_window", "w", w, least=1) - 1
        return cls(position, position.clone(), death.clamp(max=INF).to(torch.int32))

    @classmethod
    def block_causal(cls, n: int, block_length: int) -> Visibility:
        """Token i sees its whole block (i // block_length) and every earlier one."""
        length = _count("block_causal", "block_length", block_length, least=1)
        return cls(*clean_rows(_positions("block_causal", n) // length, 1))

    @classmethod
    def training(cls, n: int, block_length: int) -> Visibility:
        """Block diffusion's training mask: [n noisy rows | n clean rows] of the same n tokens.

        A noisy row sees its own noisy block and the clean blocks before it, a clean row its own clean block and those
        before it. A clean block of index b lives from 2 (b + 1) on, its noisy twin for the moment before that.
        """
        length = _count("training", "block_length", block_length, least=1)
        block = _positions("training", n) // length
        clean, birth, death = clean_rows(block + 1, 2)
        return cls(*concatenate((clean - 1, birth - 1, birth - 1), (clean, birth, death)))

    @classmethod
    def tree(cls, parents: Sequence[int] | Tensor) -> Visibility:
        """A draft tree (or forest): node i sees itself and its ancestors.

        Args:
            parents: [n] integers, the parent of each node, -1 for a root; in any order.

        Raises:
            ValueError: a parent outside -1 .. n-1, or a cycle.
        """
        order, last = _preorder([int(p) for p in parents])
        clock = torch.tensor(order, dtype=torch.int32)
        return cls(clock, clock.clone(), torch.tensor(last, dtype=torch.int32))

    @classmethod
    def temporal(
        cls,
        steps: Sequence[int] | Tensor,
        prefix_length: int = 0,
        *,
        pending: bool = False,
        stride: int | None = None,
    ) -> Visibility:
        """SimSD's verify forward over one drafted block.

        Args:
            steps: [L], the step that revealed each position: 1, 2, ..; KNOWN (0), NEVER (-1). L is the block length.
            prefix_length: committed tokens in the cache, block-causal; the drafted block starts the next block.
            pending: the block before the drafted one is finished but not in the cache: its L clean rows lead.
            stride: clock ticks per block, `stride_for(max(steps))` by default.

        Returns:
            A mask with queries [pending | known and reference tokens | mask tokens of the positions not known] and
            keys [prefix | the same rows]: 2L rows, less one for each known position, after the pending ones.
        """
        op = "temporal"
        steps = _vector(op, "steps", steps)
        length = steps.numel()
        if length == 0 or int(steps.min()) < NEVER:
            raise ValueError(
                f"{op}: steps must be 1, 2, .., 0 (known) or -1 (never), at least one, got {steps.tolist()}"
            )
        stride = _stride(op, stride, stride_for(steps=max(0, int(steps.max()))))
        prefix, block = _prefix(op, prefix_length, length, pending, stride)
        reference, mask = temporal_rows(steps, block, stride)
        drafted = steps != KNOWN
        rows = concatenate(reference, tuple(vector[drafted] for vector in mask))
        return cls._after(prefix, _pending(block, length, pending, stride), rows)

    @classmethod
    def unrolled(
        cls,
        copies: int,
        block_length: int,
        prefix_length: int = 0,
        *,
        pending: bool = False,
        stride: int | None = None,
    ) -> Visibility:
        """The exact verify forward: `copies` copies of a block, each on its own, then the finished block.

        Args:
            copies: D, the number of drafted partial reveals of the block.
            block_length: L.
            prefix_length, pending, stride: as in `temporal` (`stride_for(copies=copies)` by default).

        Returns:
            A mask with queries [pending | copy 0 | .. | copy D-1 | clean copy] and keys [prefix | the same rows].
        """
        op = "unrolled"
        copies, length = _count(op, "copies", copies), _count(op, "block_length", block_length, least=1)
        stride = _stride(op, stride, stride_for(copies=copies))
        prefix, block = _prefix(op, prefix_length, length, pending, stride)
        number = torch.arange(copies, dtype=torch.int32).repeat_interleave(length)
        drafted = copy_rows(number, torch.full_like(number, block), stride)
        finished = copy_rows(copies, torch.full((length,), block, dtype=torch.int32), stride, clean=True)
        return cls._after(prefix, _pending(block, length, pending, stride), drafted, finished)

    @classmethod
    def from_labels(cls, token_labels: Tensor, block_ids: Tensor, block_length: int) -> Visibility:
        """The temporal mask from the label encoding of SimSD's release.

        Args:
            token_labels: integers [N] or [B, N]: 0 prompt (whatever its block id; known tokens of the first drafted
                block count as prompt), 1 .. block_length the reveal step of a reference token, block_length + 1 a mask
                token, -1 padding.
            block_ids: integers, the same shape: 0, 1, .. the drafted block, -1 for prompt and padding.
            block_length: L. Prompt tokens are block-causal by their running count and seen by every drafted block.

        The k-th mask token of a block takes the step of the block's k-th reference token; one without a partner is a
        position that was never drafted. Blocks see the reference tokens of earlier blocks, never their mask tokens.

        Raises:
            TypeError, ValueError: tensors that are not integers of one shape, labels out of range, a reference or mask
                token without a block id, more blocks than clocks below INF.
        """
        op = "from_labels"
        length = _count(op, "block_length", block_length, least=1)
        labels, ids = _labels(op, token_labels, block_ids, length)
        flat = labels.dim() == 1
        if flat:
            labels, ids = labels[None], ids[None]

        prompt = labels == 0
        first = -(-prompt.sum(-1, keepdim=True) // length)  # [B, 1], the index of drafted block 0
        own = torch.where(
            prompt, (prompt.cumsum(-1) - 1) // length, first + ids
        )  # [B, N]: block index, any for padding
        stride = stride_for(steps=length)
        if own.numel():
            check_blocks(int(own.max()) + 1, stride)

        mask, padding = labels == length + 1, labels == -1
        steps = torch.where(mask, _partner_steps(labels, ids, (labels >= 1) & ~mask, mask), labels)
        (clock, birth, death), (mask_clock, mask_birth, mask_death) = temporal_rows(steps, own, stride)
        clock = torch.where(mask, mask_clock, clock).masked_fill(padding, -1)
        birth = torch.where(mask, mask_birth, birth).masked_fill(padding, INF)
        death = torch.where(mask, mask_death, death).masked_fill(padding, -1)
        return cls(clock[0], birth[0], death[0]) if flat else cls(clock, birth, death)

    @classmethod
    def _after(cls, prefix: Rows, *rows: Rows) -> Visibility:
        """The rows of one forward as queries, the cached prefix and the same rows as keys."""
        clock, _, _ = concatenate(*rows)
        _, birth, death = concatenate(prefix, *rows)
        return cls(clock, birth, death)

    def dense(self) -> Tensor:
        """The mask as booleans, [Lq, Lk] or [B, Lq, Lk]: for tests and drawings, no kernel needs it."""
        moment = self.clock[..., :, None]
        return (self.birth[..., None, :] <= moment) & (moment <= self.death[..., None, :])

    def to(self, device: torch.device | str) -> Visibility:
        return Visibility(self.clock.to(device), self.birth.to(device), self.death.to(device))

    def show(self) -> str:
        """Prints the mask as a picture for the terminal and returns it; see `simsd_kernels.drawing`."""
        from simsd_kernels import drawing

        picture = drawing.terminal(self)
        print(picture)
        return picture


def _count(op: str, name: str, value: int, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    if not least <= value < INF:
        raise ValueError(f"{op}: {name} must be at least {least} and below 2**30, got {value}")
    return value


def _positions(op: str, n: int) -> Tensor:
    return torch.arange(_count(op, "n", n), dtype=torch.int32)


def _vector(op: str, name: str, values: Sequence[int] | Tensor) -> Tensor:
    vector = torch.as_tensor(values)
    if vector.numel() == 0:
        vector = vector.to(torch.int32)
    if vector.dim() != 1 or vector.is_floating_point() or vector.dtype == torch.bool:
        raise ValueError(f"{op}: {name} must be a list of integers, got {list(vector.shape)} of {vector.dtype}")
    return vector.to(torch.int32)


def _stride(op: str, stride: int | None, least: int) -> int:
    if stride is None:
        return least
    if _count(op, "stride", stride) < least:
        raise ValueError(f"{op}: stride must be at least {least} here, got {stride}")
    return stride


def _prefix(op: str, prefix_length: int, length: int, pending: bool, stride: int) -> tuple[Rows, int]:
    """The keys of the committed prefix, and the index of the block that is drafted after it."""
    position = torch.arange(_count(op, "prefix_length", prefix_length))
    block = -(-prefix_length // length) + int(pending)
    check_blocks(block + 1, stride)
    return clean_rows(position // length, stride), block


def _pending(block: int, length: int, pending: bool, stride: int) -> Rows:
    return clean_rows(torch.full((length if pending else 0,), block - 1), stride)


def _labels(op: str, token_labels: Tensor, block_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    for name, value in (("token_labels", token_labels), ("block_ids", block_ids)):
        validate.tensor(op, name, value)
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{op}: {name} must be integers, got {value.dtype}")
    if token_labels.dim() not in (1, 2) or token_labels.shape != block_ids.shape:
        raise ValueError(
            f"{op}: token_labels and block_ids must both be [N] or [B, N], "
            f"got {list(token_labels.shape)} and {list(block_ids.shape)}"
        )
    validate.same_device(op, token_labels=token_labels, block_ids=block_ids)
    wrong = token_labels[(token_labels < -1) | (token_labels > length + 1)]
    if wrong.numel():
        raise ValueError(f"{op}: token_labels must be -1 .. block_length + 1 = {length + 1}, got {int(wrong[0])}")
    if ((token_labels > 0) & (block_ids < 0)).any():
        raise ValueError(f"{op}: a reference or mask token needs a block id of 0 or more, got -1")
    return token_labels.long(), block_ids.long()


def _partner_steps(labels: Tensor, ids: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """[B, N]: for the k-th mask token of a block, the step of the block's k-th reference token; NEVER without one."""
    count = labels.shape[1]
    if count == 0:
        return labels
    nowhere = torch.iinfo(ids.dtype).max
    index = torch.arange(count, device=ids.device)

    def by_block(chosen: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(chosen, ids, nowhere).sort(dim=-1, stable=True)

    mask_block, mask_at = by_block(mask)
    reference_block, reference_at = by_block(reference)
    rank = index - torch.searchsorted(mask_block, mask_block)  # k, in sorted order
    partner = torch.searchsorted(reference_block, mask_block) + rank
    inside = partner.clamp(max=count - 1)
    paired = (partner < count) & (reference_block.gather(1, inside) == mask_block)
    steps = torch.where(paired, labels.gather(1, reference_at.gather(1, inside)), NEVER)
    return torch.empty_like(labels).scatter_(1, mask_at, steps)


def _preorder(parents: list[int]) -> tuple[list[int], list[int]]:
    """Each node's preorder number, and the last one of its subtree."""
    n = len(parents)
    children: list[list[int]] = [[] for _ in range(n)]
    roots = []
    for node, parent in enumerate(parents):
        if not -1 <= parent < n:
            raise ValueError(f"tree: parents[{node}] must be -1 (a root) or 0 .. {n - 1}, got {parent}")
        (roots if parent == -1 else children[parent]).append(node)

    order, sequence, stack = [-1] * n, [], roots[::-1]
    while stack:
        node = stack.pop()
        order[node] = len(sequence)
        sequence.append(node)
        stack.extend(reversed(children[node]))
    if len(sequence) < n:
        raise ValueError(f"tree: parents has a cycle through node {order.index(-1)}")

    last = order.copy()
    for node in reversed(sequence):
        if parents[node] >= 0:
            last[parents[node]] = max(last[parents[node]], last[node])
    return order, last
