"""Prompts as callers give them: one or many, text, chats or ids, to token ids."""

from __future__ import annotations

from typing import Any

from simsd.errors import SimsdError
from simsd.models.loading import LoadedModel
from simsd.values import is_integer, is_list, plain


def encode_prompts(target: LoadedModel, prompts: Any) -> list[list[int]]:
    """Token ids of one prompt, or of each in a list of them.

    Args:
        prompts: a string, a chat (a list of {"role", "content"}), token ids (a list, an array or a tensor of integers),
            or a list of these; an array [B, P] is B prompts. [] is a list of no prompts; an empty prompt is "" or [[]].

    Raises:
        SimsdError: it is none of these, or the target cannot take one of them.
    """
    are_ids = len(getattr(prompts, "shape", ())) == 1  # of an array, which may be empty
    prompts = plain(prompts)
    if isinstance(prompts, str):
        return [target.encode_prompt(prompts)]
    if not is_list(prompts):
        raise SimsdError(
            "prompts must be a string, a chat, a list of token ids, or a list of these, got "
            f"{type(prompts).__name__}{_advice(prompts)}"
        )
    prompts = [plain(prompt) for prompt in prompts]
    if are_ids or (prompts and all(map(_is_part, prompts))):
        return [target.encode_prompt(prompts)]
    if any(map(_is_part, prompts)):
        kinds = " and ".join(dict.fromkeys(type(prompt).__name__ for prompt in prompts))
        raise SimsdError(f"a list of prompts cannot hold single token ids or turns of a chat, got {kinds}")
    encoded = []
    for number, prompt in enumerate(prompts):
        try:
            encoded.append(target.encode_prompt(prompt))
        except SimsdError as error:
            raise SimsdError(f"prompt {number}: {error}" if len(prompts) > 1 else str(error)) from error
    return encoded


def _is_part(value: Any) -> bool:
    """Whether a list that holds it is one prompt: a token id or a turn of a chat."""
    return is_integer(value) or isinstance(value, dict | bool | float)


def _advice(prompts: Any) -> str:
    if hasattr(prompts, "input_ids"):
        return ": give its input_ids"
    if isinstance(prompts, bytes | bytearray | memoryview):
        return ": decode it to a string"
    if isinstance(prompts, dict):
        return ": a chat is a list of turns"
    return ": give list(prompts)" if hasattr(prompts, "__iter__") else ""
