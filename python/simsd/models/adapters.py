"""Adapter folders, as peft writes them: the model that they are for, and their weights merged into its."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from simsd.errors import NotFoundError, SimsdError, one_line
from simsd.models import folders
from simsd.models.weights import listing

CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether peft, and transformers with it, takes the folder for an adapter, whatever else is in it."""
    return (folder / CONFIG).exists()


def find_base(folder: Path, **hub) -> Path:
    """The folder of the model that the adapter in `folder` is for.

    Args:
        hub: `folders.find`'s arguments for a base on the hub, but for `revision`, which the adapter names.

    Raises:
        SimsdError: it cannot be merged, peft is not installed, or there is no such model.
    """
    config, place = _config(folder), folder / CONFIG
    base, revision = config.base_model_name_or_path, config.revision
    if not base:
        raise SimsdError(f"{place} names no base_model_name_or_path: write the folder or hub id of its model there")
    is_here = base in folders.BUILT_IN or Path(base).expanduser().is_dir()
    try:
        found = folders.find(base, revision=None if is_here else revision, **hub)
    except SimsdError as error:
        raise type(error)(f"{place} has base_model_name_or_path {base!r}, which cannot be had: {error}") from error
    if is_adapter(found):
        raise SimsdError(f"{place} is for {base}, an adapter itself: merge that one first (save what simsd.load makes)")
    return found


def merge(model: PreTrainedModel, folder: Path) -> None:
    """Adds what the adapter in `folder` has learnt to the model's weights, in place: in their dtype, as peft does it.

    Raises:
        SimsdError: parts of one have no counterpart in the other, or the adapter would change the model's shape.
    """
    import peft

    config = _config(folder)
    # peft compares them, and tells of a difference that there always is: we were given the model.
    config.base_model_name_or_path, config.inference_mode = model.name_or_path, True
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    with _refusals(folder), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", FutureWarning)  # of peft's calls, about which its user can do nothing
        # First weights are drawn here, and replaced by the adapter's.
        adapted = peft.get_peft_model(model, config)
        result = adapted.load_adapter(str(folder), "default", torch_device=str(model.device))
        if result.missing_keys or result.unexpected_keys:
            lacks, surplus = listing(result.missing_keys), listing(result.unexpected_keys)
            raise SimsdError(
                f"it does not fit {model.name_or_path}:"
                + (f" it has no {lacks}" if lacks else f" the model has no place for {surplus}")
            )
        merged = adapted.merge_and_unload(safe_merge=False)
    if merged is not model or {name: value.shape for name, value in model.state_dict().items()} != shapes:
        raise SimsdError(f"{folder}: merged, it has other weights than {type(model).__name__}, which nothing would run")
    model.requires_grad_(True)  # as without an adapter: peft had frozen them


def _config(folder: Path):
    """peft's configuration of an adapter that it can merge and whose weights are there."""
    try:
        import peft
    except ImportError as error:
        raise SimsdError(
            f'{folder} holds an adapter ({CONFIG}), which peft merges: pip install "simsd-kernels[lora]"'
        ) from error
    folders.read_json(folder / CONFIG)
    with _refusals(folder):
        config = peft.PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning or config.is_adaption_prompt or config.peft_type == peft.PeftType.XLORA:
        raise SimsdError(
            f"{folder}: a {config.peft_type.value} adapter is no fixed change of weights and cannot be merged; LoRA and"
            " its relatives can"
        )
    if getattr(config, "megatron_config", None):  # peft would import the module that the configuration names
        raise SimsdError(f"{folder / CONFIG} has a megatron_config: adapters of Megatron's layers are not merged")
    if not (folder / _WEIGHTS).exists():
        raise NotFoundError(f"{folder} has no {_WEIGHTS}: save the adapter as safetensors (peft's save_pretrained)")
    return config


@contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # peft's have a type of their own for each kind of mistake
        raise SimsdError(f"{folder}: peft cannot merge this adapter: {one_line(error)}") from error
