"""`simsd models`: what `--target` and `--draft` take without a download, and the families of models that load. Neither
torch nor the network is needed."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from simsd.cli import streams
from simsd.errors import SimsdError
from simsd.models.families import FAMILIES, REFUSALS, Family, of_checkpoint

PAIR = Path(__file__).parents[1] / "pair"


def models(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """List the built-in models, those of the Hugging Face cache that can be decoded, and the families that load."""
    built_in, cached = built_in_models(), cached_models()
    if as_json:
        families = [dataclasses.asdict(family) for family in FAMILIES]
        refused = [{"models": refusal.models, "reason": refusal.reason} for refusal in REFUSALS]
        listed = {"built_in": built_in, "cached": cached, "families": families, "refused": refused}
        print(streams.json_line(listed, sys.stdout))
        return
    print("built-in")
    show(built_in)
    print(f"\ncached in {cache_folder()}")
    show(cached)
    print("\nFolders go as well: --target PATH.")
    print("\nfamilies that load")
    for family in FAMILIES:
        print(f"  {family.name}: {describe_family(family)}")
    print("\nnot decoded")
    for refusal in REFUSALS:
        print(f"  {refusal.models}: {refusal.reason}")


def show(found: list[dict[str, Any]]) -> None:
    width = max((len(model["name"]) for model in found), default=0)
    for model in found:
        print(f"  {model['name'].ljust(width)}  {model['summary']}")
    if not found:
        print("  none of a family that loads")


def describe_family(family: Family) -> str:
    settings = [
        None if family.block_length is None else f"blocks of {family.block_length}",
        None if family.mask_token_id is None else f"mask token {family.mask_token_id}",
        "a row predicts the next position" if family.shift else None,
    ]
    given = ", ".join(setting for setting in settings if setting)
    described = f"{family.models}; {family.stock}'s layers" + (f"; {given} unless told otherwise" if given else "")
    return f"{described}; checked against {family.checked}"


def built_in_models() -> list[dict[str, Any]]:
    """Each built-in model with its size, read without loading it; never raises."""
    from simsd.cli.options import DRAFT, TARGET

    return [{"name": name} | describe(PAIR / name) for name in (TARGET, DRAFT)]


def cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached_models() -> list[dict[str, Any]]:
    """The models of the cache by hub id, as far as they are of a kind that can be decoded; never raises."""
    found = []
    for folder in sorted(cache_folder().glob("models--*--*")):
        snapshot = _snapshot(folder)
        if snapshot is not None and _is_decoded(snapshot):
            found.append({"name": folder.name.removeprefix("models--").replace("--", "/", 1)} | describe(snapshot))
    return found


def _snapshot(folder: Path) -> Path | None:
    """The revision that `simsd.load` would take: main's, else the one that came last; None where there is none."""
    main = folder / "refs" / "main"
    try:
        named = folder / "snapshots" / main.read_text(encoding="utf-8").strip() if main.is_file() else None
        if named is not None and named.is_dir():
            return named
        return max((folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime, default=None)
    except OSError:
        return None


def _is_decoded(folder: Path) -> bool:
    try:
        of_checkpoint(str(folder), json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, SimsdError):
        return False
    return True


def describe(folder: Path) -> dict[str, Any]:
    """A checkpoint folder's size and shape in words and numbers; what is damaged says so."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        files = _weight_files(folder)
        parameters = sum(_parameters(file) for file in files)
        size = sum(file.stat().st_size for file in files)
        layers = f"{config['num_hidden_layers']} layer{'' if config['num_hidden_layers'] == 1 else 's'}"
        summary = (
            f"{parameters / 1e6:.2f} M parameters, {layers} of {config['hidden_size']}, "
            f"vocabulary {config['vocab_size']}, block length {_block_length(config)}, {size / 1e6:.1f} MB"
        )
    except Exception as error:  # a list of what is there reports what is broken, it does not break
        return {"summary": f"missing or damaged: {error}"}
    return {"summary": summary, "parameters": parameters, "bytes": size, "folder": str(folder)}


def _block_length(config: dict[str, Any]) -> int | str:
    return next((config[name] for name in ("block_length", "block_size") if config.get(name)), "not given")


def _weight_files(folder: Path) -> list[Path]:
    """All of the checkpoint's; raises where one is missing."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{len(missing)} of {len(names)} weight files are not there, {missing[0]} for one")
    return [folder / name for name in names]


def _parameters(file: Path) -> int:
    """Of a safetensors file, by its header: a length of eight bytes, then JSON."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
