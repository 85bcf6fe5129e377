"""What every configuration of ours holds besides its architecture's: block length, mask token, shift, sub-blocks."""

from __future__ import annotations

import os
import re

from transformers import PretrainedConfig

from simsd.errors import SimsdError

DEFAULT_BLOCK_LENGTH = 4
# How to compute is for the caller to say, not for a file: published ones name what their training used.
_NOT_A_FILES = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
# Names that published configurations give the block length: ours, SDAR's, Fast-dLLM v2's.
_BLOCK_LENGTHS = ("block_length", "block_size", "bd_size")
# Published checkpoints that decode with other blocks than of 4 say so in their names: "SDAR-8B-Chat-b32". A snapshot in
# the hub's cache lies in "models--JetLM--SDAR-8B-Chat-b32/snapshots/<revision>".
_NAMED = re.compile(r"SDAR-[^/\\]*-b(\d+)([/\\]snapshots[/\\][^/\\]+)?$")


class BlockDiffusionConfig:
    """Reading a checkpoint's config.json; mixed into transformers' configurations, which declare the fields.

    Attributes:
        block_length: tokens per block; None: not recorded.
        mask_token_id: None: not recorded.
        shift: whether the logits of a row are those of the next position, as an autoregressive model's; False: of its
            own.
        sub_block_length: tokens per sub-block (see `simsd.SamplingParams`); None: blocks have none.
        first_token_alone: whether a block's first token is a sub-block of its own.
    """

    sub_block_length = None
    first_token_alone = False

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **kwargs):
        return super().from_pretrained(source, **{"name_or_path": str(source)} | kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """A configuration from the fields of a file; `kwargs` are the caller's and win.

        The block length is that of `block_length` or of another name that published files have for it or, where there
        is none, the one in the name of a published checkpoint.

        Raises:
            SimsdError: two of them disagree.
        """
        fields = {name: value for name, value in config_dict.items() if name not in _NOT_A_FILES}
        taken = {name: fields.pop(name, None) for name in _BLOCK_LENGTHS}
        given = {name: value for name, value in taken.items() if value is not None}
        if len(set(given.values())) > 1:
            shown = " and ".join(f"{name} {value}" for name, value in given.items())
            raise SimsdError(f"{shown} are one setting: remove one of them")
        fields["block_length"] = next(iter(given.values()), None)
        if fields["block_length"] is None:
            fields["block_length"] = named_block_length(kwargs.get("name_or_path", ""))
        return super().from_dict(fields, **kwargs)


def named_block_length(source: str | os.PathLike) -> int | None:
    """32 of ".../SDAR-8B-Chat-b32", a folder or a hub id; None of other names."""
    name = os.path.realpath(source) if os.path.isdir(source) else str(source)
    found = _NAMED.search(name)
    return int(found[1]) if found else None


def head_size(config: PretrainedConfig) -> int:
    """Of a head of queries, keys or values."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
