"""Prompt files of a user's own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from simsd.errors import SimsdError


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt (a string, or a chat as a list of turns) with what its line said besides: the `id`, if there was one."""

    prompt: Any
    given: dict[str, Any] = dataclasses.field(default_factory=dict)

    def with_system(self, system: str | None) -> Any:
        """The prompt, behind a system turn where there is to be one."""
        if system is None:
            return self.prompt
        chat = [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt
        if any(turn.get("role") == "system" for turn in chat):
            raise SimsdError("a chat among the prompts has a system turn of its own: leave out --system")
        return [{"role": "system", "content": system}, *chat]


def read_prompts(file: Path) -> list[Any]:
    """The prompts alone of `read_requests`."""
    return [request.prompt for request in read_requests(file)]


def read_requests(file: Path) -> list[Request]:
    """Prompts of a file: a line each; in .jsonl files a string, or an object with "prompt" or "messages" and, if it
    likes, "id" per line."""
    lines = [line for _, line in read_lines(file)]
    if not lines:
        raise SimsdError(f"{file} holds no prompts")
    if file.suffix != ".jsonl":
        return [Request(line) for line in lines]
    return [_json_request(file, number, line) for number, line in enumerate(lines, start=1)]


def read_lines(file: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, each with its number from 1 on."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SimsdError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise SimsdError(f"{file} cannot be read: {error.strerror}") from error
    # Not splitlines(): JSON strings may hold characters that it takes for line ends (U+2028, U+0085).
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def is_prompt(value: Any) -> bool:
    """Whether it is a string or a chat."""
    is_chat = isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
    return isinstance(value, str) or bool(is_chat)


def _json_request(file: Path, number: int, line: str) -> Request:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise SimsdError(f"{file}, prompt {number} is not JSON: {error}") from error
    given = {}
    if isinstance(value, dict):
        given = {"id": value["id"]} if "id" in value else {}
        value = value.get("prompt", value.get("messages"))
    if not is_prompt(value):
        raise SimsdError(f'{file}, prompt {number}: expected a string, {{"prompt": "..."}} or {{"messages": [...]}}')
    return Request(value, given)
