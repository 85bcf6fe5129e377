"""SDAR's configurations: Qwen3's, the block length and the mask token."""

from __future__ import annotations

import os
import re

from transformers import PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from simsd.errors import SimsdError

DEFAULT_BLOCK_LENGTH = 4
# How to compute is for the caller to say, not for a file: published ones name what their training used.
_NOT_A_FILES = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
# Published checkpoints that decode with other blocks than of 4 say so in their names: "SDAR-8B-Chat-b32". A snapshot in
# the hub's cache lies in "models--JetLM--SDAR-8B-Chat-b32/snapshots/<revision>".
_NAMED = re.compile(r"SDAR-[^/\\]*-b(\d+)([/\\]snapshots[/\\][^/\\]+)?$")


class _SDAR:
    """Reading a checkpoint's config.json; mixed into transformers' configurations."""

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **kwargs):
        return super().from_pretrained(source, **{"name_or_path": str(source)} | kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """A configuration from the fields of a file; `kwargs` are the caller's and win.

        The block length is that of `block_length` or `block_size` (SDAR's own name for it) or, where there is neither,
        the one in the name of a published checkpoint.

        Raises:
            SimsdError: the two disagree.
        """
        fields = {name: value for name, value in config_dict.items() if name not in _NOT_A_FILES}
        given = [fields.pop(name, None) for name in ("block_length", "block_size")]
        if None not in given and given[0] != given[1]:
            raise SimsdError(f"block_length {given[0]} and block_size {given[1]} are one setting: remove one of them")
        fields["block_length"] = given[1] if given[0] is None else given[0]
        if fields["block_length"] is None:
            fields["block_length"] = named_block_length(kwargs.get("name_or_path", ""))
        return super().from_dict(fields, **kwargs)


class SDARConfig(_SDAR, Qwen3Config):
    """Qwen3's configuration, the block length of the checkpoint (None: not recorded) and the mask token's id."""

    model_type = "sdar"
    attribute_map = Qwen3Config.attribute_map | {"block_size": "block_length"}

    block_length: int | None = None
    mask_token_id: int | None = None


class SDARMoeConfig(_SDAR, Qwen3MoeConfig):
    """Qwen3-MoE's configuration, the block length of the checkpoint (None: not recorded) and the mask token's id."""

    model_type = "sdar_moe"
    attribute_map = Qwen3MoeConfig.attribute_map | {"block_size": "block_length"}

    block_length: int | None = None
    mask_token_id: int | None = None


def named_block_length(source: str | os.PathLike) -> int | None:
    """32 of ".../SDAR-8B-Chat-b32", a folder or a hub id; None of other names."""
    name = os.path.realpath(source) if os.path.isdir(source) else str(source)
    found = _NAMED.search(name)
    return int(found[1]) if found else None


def head_size(config: PretrainedConfig) -> int:
    """Of a head of queries, keys or values."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
