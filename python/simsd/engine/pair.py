"""A target and its draft: how they are loaded, and whether models, settings and prompts fit together."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from simsd.config import MAX_BLOCK_LENGTH, EngineConfig, SamplingParams
from simsd.errors import SimsdError, one_line
from simsd.models.loading import LoadedModel, load
from simsd.models.tokenizer import differing_ids
from simsd_kernels import dispatch

CONTROL_OPS = ("plan_block", "propose_block", "verify_graph", "advance_slots", "reveal")
# Arguments of `simsd.load`: what a pair has in common, and what each of its models says of itself.
OF_BOTH = ("dtype", "device", "quantize", "block_length", "mask_token_id", "local_files_only")
OF_ONE = ("family", "shift", "revision")
SETTINGS = (*OF_BOTH, *OF_ONE, *(f"draft_{name}" for name in OF_ONE))  # of `load_pair`


def check_device(device: torch.device) -> None:
    """Raises SimsdError where the ops of an iteration would have to look at a GPU's values on the host."""
    if device.type != "cuda":
        return
    for op in CONTROL_OPS:
        if why := dispatch.compiled_obstacle(op, "CUDA"):
            raise SimsdError(
                f"decoding on {device} needs the package's CUDA ops, and {op} is missing: {why}; install with nvcc on"
                f" PATH: SIMSD_BUILD_CUDA=1 {dispatch.REINSTALL}"
            )


def load_pair(target: str, draft: str | None, settings: Mapping[str, Any]) -> tuple[LoadedModel, LoadedModel | None]:
    """Loads a target and, where one is named, its draft.

    Args:
        settings: arguments of `simsd.load` by name, those in SETTINGS; others are not looked at. None: not given. Those
            of OF_BOTH are of both models, those of OF_ONE of the target and, with `draft_` before them, of the draft.
    """

    def load_one(source: str, prefix: str) -> LoadedModel:
        given = {name: settings.get(name) for name in OF_BOTH}
        given |= {name: settings.get(prefix + name) for name in OF_ONE}
        return load(source, **{name: value for name, value in given.items() if value is not None})

    return load_one(target, ""), None if draft is None else load_one(draft, "draft_")


def block_length(target: LoadedModel, draft: LoadedModel | None, config: EngineConfig) -> int:
    """The block length to decode with: the config's, else the models' own, which must then agree."""
    if config.block_length is None and draft is not None and draft.block_length != target.block_length:
        raise SimsdError(
            f"target {target.name} has block length {target.block_length}, draft {draft.name} {draft.block_length}: "
            "use a pair of one block length or set block_length"
        )
    length = config.block_length or target.block_length
    if not 1 <= length <= MAX_BLOCK_LENGTH:
        raise SimsdError(f"block length must be in 1..{MAX_BLOCK_LENGTH}, got {length} from {target.name}")
    return length


def sub_blocks(target: LoadedModel, params: SamplingParams, block_length: int) -> list[int]:
    """Lengths of the sub-blocks of a block, from the left; the block's own where it has none."""
    own = target.config.sub_block_length or block_length
    length = min(own if params.sub_block_length is None else params.sub_block_length, block_length)
    borders = {*range(0, block_length, length), block_length}
    if target.config.first_token_alone:
        borders.add(1)
    return [end - first for first, end in itertools.pairwise(sorted(borders))]


def draft_device(target: LoadedModel, config: EngineConfig) -> torch.device:
    """Where the draft model is to be: the config's `draft_device`, else where the target is."""
    if config.draft_device is None:
        return target.device
    try:
        device = torch.device(config.draft_device)
    except RuntimeError as error:
        raise SimsdError(f"draft_device: {one_line(error)}") from None
    if device.type != target.device.type:
        raise SimsdError(
            f"draft_device {device} is not of the kind of {target.device}, where target {target.name} is: both on the"
            " CPU or both on GPUs"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def check_pair(target: LoadedModel, draft: LoadedModel | None, drafts_on: torch.device) -> None:
    """Raises SimsdError where the models do not fit together, or the draft is not on the device `drafts_on`."""
    if draft is None:
        return
    if draft.device != drafts_on:
        raise SimsdError(
            f"draft {draft.name} is on {draft.device}, not on {drafts_on}: load it there, or set"
            f' draft_device="{draft.device}"'
        )
    if found := _vocabularies_differ(target, draft):
        raise SimsdError(f"draft {draft.name} does not fit target {target.name}: {found}")


def _vocabularies_differ(target: LoadedModel, draft: LoadedModel) -> str | None:
    """Whether token ids mean different things to the models, and how. Rows of padding and mask tokens may differ, where
    tokenizers tell which those are."""
    if target.tokenizer is not None and draft.tokenizer is not None:
        masks = target.mask_token_id, draft.mask_token_id
        unlike = differing_ids(target.tokenizer.backend, draft.tokenizer.backend)
        number = min((i for i in unlike if i not in masks), default=None)
        if number is None:
            return None
        theirs, ours = (m.tokenizer.backend.convert_ids_to_tokens(number) for m in (draft, target))
        return f"token {number} is {theirs!r} to it, {ours!r} to the target: use a draft of the target's vocabulary"
    for what in ("vocab_size", "mask_token_id"):
        ours, theirs = getattr(target, what), getattr(draft, what)
        if ours != theirs:
            return f"{what.replace('_', ' ')} {theirs} against {ours}, which only models with tokenizers may differ in"
    return None


def check_length(
    capacity: int, prompt_tokens: int, params: SamplingParams, target: LoadedModel, draft: LoadedModel | None
) -> None:
    """`capacity`: positions that a request needs, in whole blocks."""
    for model in (target, draft):
        if model is not None and model.max_positions is not None and capacity > model.max_positions:
            raise SimsdError(
                f"{prompt_tokens} prompt tokens + max_new_tokens {params.max_new_tokens}, in whole blocks {capacity}, "
                f"exceed the {model.max_positions} positions of {model.name}: shorten the prompt or lower "
                "max_new_tokens"
            )


def check_params(target: LoadedModel, draft: LoadedModel | None, params: SamplingParams, block_length: int) -> None:
    """Raises SimsdError where a request's settings do not fit the models or the block length."""
    params.reveal_counts(block_length, sub_blocks(target, params, block_length))
    if params.stop and target.tokenizer is None:
        raise SimsdError(f"stop strings need a tokenizer, and {target.name} has none: use end_token_ids")
    if params.verify == "exact" and params.drafter == "model" and draft is None:
        raise SimsdError(
            "drafter='model' needs a draft model, got None: name one, or use drafter='auto', 'self' or 'lookup'"
        )
