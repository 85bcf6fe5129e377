"""`simsd models`: what `--target` and `--draft` take without a download, and the families of models that load. Neither
torch nor the network is needed."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from simsd.cli import streams
from simsd.errors import SimsdError
from simsd.models.families import FAMILIES, REFUSALS, of_checkpoint
from simsd.models.folders import BUILT_IN, PAIR

if TYPE_CHECKING:
    from rich.console import Console


def models(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """List the built-in models, those of the Hugging Face cache that can be decoded, and the families that load."""
    built_in, cached = built_in_models(), cached_models()
    if as_json:
        families = [dataclasses.asdict(family) for family in FAMILIES]
        refused = [{"models": refusal.models, "reason": refusal.reason} for refusal in REFUSALS]
        listed = {"built_in": built_in, "cached": cached, "families": families, "refused": refused}
        print(streams.json_line(listed, sys.stdout))
        return
    console = streams.output()
    console.print("built-in")
    show(built_in, console)
    console.print(f"\ncached in {cache_folder()}", markup=False, soft_wrap=True)
    show(cached, console)
    console.print("\nFolders go as well: --target PATH.\n")
    settings = [
        (family.name, family.models, *_settings(family.block_length, family.mask_token_id, family.shift), family.stock)
        for family in FAMILIES
    ]
    show_table(console, "families that load", ("family", "models", "block", "mask", "shift", "layers"), settings)
    console.print(
        "Block length, mask token and shift: of a checkpoint that does not say otherwise (-: it says so itself, or its"
        " name or its tokenizer). Options name others: --block-length, --mask-token-id, --shift.\n",
        style="dim",
    )
    checked = [(family.name, family.checked) for family in FAMILIES]
    show_table(console, "what they were checked against", ("family", "code"), checked)
    refused = [(refusal.models, refusal.reason) for refusal in REFUSALS]
    show_table(console, "not decoded", ("models", "why"), refused)


def _settings(*values: int | bool | None) -> list[str]:
    return [{None: "-", True: "yes", False: "no"}.get(value, str(value)) for value in values]


def show(found: list[dict[str, Any]], console: Console) -> None:
    """A line each, and more where it is narrow."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for model in found:
        table.add_row(escape(f"  {model['name']}"), escape(model["summary"]))
    console.print(table if found else "  none of a family that loads")


def show_table(console: Console, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Sentences are wrapped, names and numbers are not."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, no_wrap=number != 1)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def built_in_models() -> list[dict[str, Any]]:
    """Each built-in model with its size, read without loading it; never raises."""
    return [{"name": name} | describe(PAIR / name) for name in BUILT_IN]


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
