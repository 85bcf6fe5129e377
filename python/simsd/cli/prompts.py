"""Prompt files of a user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simsd.errors import SimsdError


def read_prompts(file: Path) -> list[Any]:
    """Prompts of a file: a line each; in .jsonl files a string, or an object with "prompt" or "messages", per line."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise SimsdError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise SimsdError(f"{file} cannot be read: {error.strerror}") from error
    if not lines:
        raise SimsdError(f"{file} holds no prompts")
    if file.suffix != ".jsonl":
        return lines
    return [_json_prompt(file, number, line) for number, line in enumerate(lines, start=1)]


def _json_prompt(file: Path, number: int, line: str) -> Any:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise SimsdError(f"{file}, prompt {number} is not JSON: {error}") from error
    if isinstance(value, dict):
        value = value.get("prompt", value.get("messages"))
    is_chat = isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
    if not isinstance(value, str) and not is_chat:
        raise SimsdError(f'{file}, prompt {number}: expected a string, {{"prompt": "..."}} or {{"messages": [...]}}')
    return value
