"""Question/answer files of a user's own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from simsd.cli.prompts import is_prompt, read_lines
from simsd.errors import SimsdError
from simsd.evaluate import matchers

DEFAULT_GROUP = "questions"


@dataclasses.dataclass(frozen=True)
class Question:
    """A line of a file. `answers`: any of them is right; `group`: what it is shown with."""

    line: int
    prompt: Any
    answers: list[str]
    group: str


def read_questions(file: Path, match: str, question_key: str, answer_key: str, group_key: str | None) -> list[Question]:
    """Questions of a JSON Lines file: an object per line, whose question is a string or a chat (a list of turns), and
    whose answer is a string, a number or a list of these, any of which is right.

    Args:
        match: the name of the matcher, which some answers cannot satisfy.
        group_key: of what to show questions by, None: all together.

    Raises SimsdError for a file that cannot be read or holds no questions, and for the first bad line, by its number.
    """
    questions = []
    for number, line in read_lines(file):
        try:
            questions.append(_question(number, line, match, question_key, answer_key, group_key))
        except SimsdError as error:
            raise SimsdError(f"{file}, line {number}: {error}") from None
    if not questions:
        raise SimsdError(f"{file} holds no questions")
    return questions


def _question(
    number: int, line: str, match: str, question_key: str, answer_key: str, group_key: str | None
) -> Question:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise SimsdError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise SimsdError(f'expected {{"{question_key}": ..., "{answer_key}": ...}}, got {line.strip():.60}')
    for option, key in (("question", question_key), ("answer", answer_key), ("group", group_key)):
        if key is not None and key not in value:
            raise SimsdError(f"no {key!r} among its keys {', '.join(value) or '(none)'}: name it by --{option}-key")
    prompt, given = value[question_key], value[answer_key]
    if not is_prompt(prompt):
        raise SimsdError(f"{question_key!r} must be a string or a list of turns, got {json.dumps(prompt):.60}")
    answers = given if isinstance(given, list) else [given]
    if not answers or not all(map(_is_answer, answers)):
        raise SimsdError(f"{answer_key!r} must be a string, a number or a list of these, got {json.dumps(given):.60}")
    answers = [str(answer) for answer in answers]
    for answer in answers:
        if obstacle := matchers.obstacle(match, answer):
            raise SimsdError(obstacle)
    return Question(number, prompt, answers, _group(value, group_key))


def _group(value: dict[str, Any], group_key: str | None) -> str:
    return DEFAULT_GROUP if group_key is None else str(value[group_key]).strip() or "(none)"


def _is_answer(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)
