"""Checkpoint folders: the built-in ones, those on this machine, those of the hub; and their JSON files."""

from __future__ import annotations

import json
from pathlib import Path

from simsd.errors import NotFoundError, SimsdError, one_line

# A built-in target and its draft, trained on the questions of `simsd.tasks` and of `simsd.questionnaires`.
TINY_PAIR = "tiny-target", "tiny-draft"
LONG_PAIR = "long-target", "long-draft"
BUILT_IN = (*TINY_PAIR, *LONG_PAIR)
PAIR = Path(__file__).parents[1] / "pair"
# With the tokenizer's files: Qwen2's slow ones are vocab.json, merges.txt and added_tokens.json.
_DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model")


def find(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a built-in model's name, of a local path or of a hub id (downloaded where it is not cached).

    The other arguments are `huggingface_hub.snapshot_download`'s; a folder on this machine has no revisions.
    """
    if source in BUILT_IN:
        folder = PAIR / str(source)
        if not folder.is_dir():
            raise NotFoundError(f"the built-in model {source} is not in this installation ({folder}): reinstall")
    else:
        folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise SimsdError(
                f"revision={revision!r} is for hub ids, {folder} is a folder on this machine: leave it out"
            )
        return folder
    if folder.exists():
        raise SimsdError(f"{folder} is a file: give the checkpoint's folder")
    if isinstance(source, Path) or str(source).count("/") != 1 or str(source).startswith((".", "~", "/")):
        raise NotFoundError(f"no checkpoint {str(source)!r}: not a folder, nor {', '.join(BUILT_IN)}, nor a hub id")
    return _download(str(source), revision, cache_dir, token, local_files_only)


def _download(
    hub_id: str, revision: str | None, cache_dir: str | Path | None, token: str | bool | None, local_files_only: bool
) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=list(_DOWNLOADED),
        )
    except errors.GatedRepoError as error:
        raise NotFoundError(
            f"{hub_id!r} is gated: accept its terms at https://huggingface.co/{hub_id}, then log in (hf auth login) or"
            " pass token="
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise NotFoundError(
            f"{hub_id!r} is no local folder, and the hub has no such repository or does not show it: check the name or,"
            " if it is private, log in (hf auth login) or pass token="
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NotFoundError(
            f"{hub_id!r} has no revision {revision!r}: give a branch, a tag or a commit that"
            f" https://huggingface.co/{hub_id}/commits/main lists"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise NotFoundError(
            f"{hub_id!r} is no local folder and cannot be had from the hub:"
            f" {_offline(local_files_only, revision)} ({_first_line(error)})"
        ) from error
    except (OSError, ValueError) as error:  # the hub's HTTP errors; a hub id that is none
        raise NotFoundError(
            f"{hub_id!r} is no local folder and cannot be had from the hub: {_first_line(error)}"
        ) from error
    return Path(folder)


def _offline(local_files_only: bool, revision: str | None) -> str:
    from huggingface_hub import constants

    missing = "it is not whole in the cache" if revision is None else f"revision {revision!r} is not whole in the cache"
    if local_files_only:
        return f"{missing}, and local_files_only=True forbids a download"
    if constants.HF_HUB_OFFLINE:
        return f"{missing}, and HF_HUB_OFFLINE forbids a download"
    return f"{missing}, and the hub cannot be reached"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"{file.parent} has no {file.name}: not a checkpoint in Hugging Face format") from None
    except (ValueError, OSError) as error:
        raise SimsdError(f"{file} cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise SimsdError(f"{file} must hold a JSON object, got {type(value).__name__}")
    return value
