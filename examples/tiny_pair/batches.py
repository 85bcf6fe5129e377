"""Training batches for block diffusion: clean rows of prompt and response, then noisy copies of its blocks."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from build_tokenizer import ASSISTANT, END, MASK, PAD, USER
from recipes import Recipe
from tokenizers import Tokenizer

from simsd_kernels import INF, Visibility

NOISY_COPIES = 3


@dataclass(frozen=True)
class Batch:
    """Rows of B sequences: S = clean rows + noisy copies, padded."""

    tokens: torch.Tensor  # [B, S] int64
    positions: torch.Tensor  # [B, S] int64; a noisy row has the position of its clean token
    visibility: Visibility  # of rows as queries and as keys, [B, S] each; padding sees nothing and is seen by nothing
    masked: torch.Tensor  # [M] int64, the rows to predict, indexes into B*S
    targets: torch.Tensor  # [M] int64


class Encoder:
    """Turns tasks into token ids in the chat format."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.mask_id, self.user_id, self.assistant_id, self.end_id, self.pad_id = (
            tokenizer.token_to_id(token) for token in (MASK, USER, ASSISTANT, END, PAD)
        )

    def prompt(self, item) -> list[int]:
        return [self.user_id, *self.tokenizer.encode(item.prompt).ids, self.end_id, self.assistant_id]

    def example(self, item, block_length: int) -> tuple[int, list[int]]:
        """The prompt's length and all tokens, the last block filled with end tokens."""
        prompt = self.prompt(item)
        tokens = prompt + self.tokenizer.encode(item.response).ids + [self.end_id]
        return len(prompt), tokens + [self.end_id] * (-len(tokens) % block_length)


def training_batches(
    encoder: Encoder, recipe: Recipe, parts: int, rng: random.Random, noise: np.random.Generator
) -> list[Batch]:
    """Draw the items of one optimizer step, sorted by length and cut into `parts` batches so that little is padding."""
    block_length = rng.choice(recipe.block_lengths)
    items, mixture = recipe.items_per_step, recipe.mixture
    families = rng.choices(list(mixture), list(mixture.values()), k=items)
    examples = [encoder.example(recipe.items.training_item(family, rng), block_length) for family in families]
    examples.sort(key=lambda example: (len(example[1]) - example[0], len(example[1])))
    size = -(-items // parts)
    return [make_batch(encoder, examples[i : i + size], noise, block_length) for i in range(0, items, size)]


def make_batch(
    encoder: Encoder, examples: list[tuple[int, list[int]]], noise: np.random.Generator, block_length: int
) -> Batch:
    """Lay out [clean rows | copy 0 | copy 1 | ...] for every example and mask the copies at random."""
    L, C = block_length, NOISY_COPIES
    B = len(examples)
    # The last block's clean rows would serve nobody; the first noisy block may begin with known prompt tokens.
    clean_rows = max(len(tokens) for _, tokens in examples) - L
    copy_rows = max(len(tokens) - prompt // L * L for prompt, tokens in examples)

    clean = np.full((B, clean_rows), encoder.pad_id)
    clean_positions = np.broadcast_to(np.arange(clean_rows), (B, clean_rows))
    known = np.full((B, copy_rows), encoder.pad_id)
    first = np.array([prompt // L * L for prompt, _ in examples])
    copy_positions = first[:, None] + np.arange(copy_rows)
    length = np.array([len(tokens) for _, tokens in examples])
    for b, (_, tokens) in enumerate(examples):
        clean[b, : len(tokens) - L] = tokens[:-L]
        known[b, : len(tokens) - first[b]] = tokens[first[b] :]
    prompt_length = np.array([prompt for prompt, _ in examples])
    maskable = (copy_positions >= prompt_length[:, None]) & (copy_positions < length[:, None])

    masked = _draw_masks(np.broadcast_to(maskable[:, None], (B, C, copy_rows)), noise, L)
    noisy = np.where(masked, encoder.mask_id, known[:, None])

    # A clean block lives from a moment of its own on; its noisy copies before it, each for one moment.
    stride = C + 1
    clean_birth = np.where(clean_positions < length[:, None] - L, (clean_positions // L + 1) * stride, INF)
    copy_end = np.where(copy_positions < length[:, None], (copy_positions // L + 1) * stride, INF)
    copy_birth = [np.where(copy_end < INF, copy_end - copy, INF) for copy in range(1, C + 1)]
    birth = torch.from_numpy(np.concatenate([clean_birth, *copy_birth], 1)).to(torch.int32)
    visibility = Visibility(
        clock=birth.masked_fill(birth == INF, -1),
        birth=birth,
        death=torch.cat([torch.full((B, clean_rows), INF, dtype=torch.int32), birth[:, clean_rows:]], 1),
    )

    all_masked = np.concatenate([np.zeros((B, clean_rows), bool), masked.reshape(B, -1)], 1)
    all_known = np.concatenate([clean, np.tile(known, C)], 1)
    rows = np.flatnonzero(all_masked)
    return Batch(
        tokens=torch.from_numpy(np.concatenate([clean, noisy.reshape(B, -1)], 1)),
        positions=torch.from_numpy(np.concatenate([clean_positions, np.tile(copy_positions, C)], 1)),
        visibility=visibility,
        masked=torch.from_numpy(rows),
        targets=torch.from_numpy(all_known.ravel()[rows]),
    )


def _draw_masks(maskable: np.ndarray, noise: np.random.Generator, block_length: int) -> np.ndarray:
    """Mask k of each block's maskable positions, k uniform in 1..available: every state of decoding is equally likely.

    [B, C, R] bool -> [B, C, R] bool
    """
    blocks = maskable.reshape(*maskable.shape[:2], -1, block_length)
    available = blocks.sum(-1, keepdims=True)
    count = 1 + np.floor(noise.random(available.shape) * available)
    order = np.where(blocks, noise.random(blocks.shape), 2.0)
    rank = order.argsort(-1).argsort(-1)
    return ((rank < count) & blocks).reshape(maskable.shape)
