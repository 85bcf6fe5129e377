"""Questionnaires: several questions of one family of `simsd.tasks` in one prompt, one to a line, answered line by line.

Their answers are long (40 to 100 tokens of the built-in tokenizer): what decoding in blocks of 8 to 32 is measured on,
and what the built-in long pair is trained on. No held-out questionnaire has a question that any training item shares.
Choices of one prompt have the same options in the same order.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from simsd import tasks
from simsd.tasks import FAMILIES, Task

__all__ = [
    "FAMILIES",
    "HELD_OUT_QUESTIONS",
    "QUESTIONS",
    "Questionnaire",
    "held_out",
    "is_correct",
    "score",
    "training_item",
]

# Fewest and most questions of one prompt.
QUESTIONS = {"arithmetic": (3, 5), "code": (4, 7), "facts": (5, 8), "choice": (5, 7)}
HELD_OUT_QUESTIONS = 300  # of a family


@dataclass(frozen=True)
class Questionnaire:
    """Questions, all of `family`, and the text of the prompt and of the full reference response."""

    family: str
    questions: tuple[Task, ...]

    @property
    def prompt(self) -> str:
        return _numbered(question.prompt for question in self.questions)

    @property
    def response(self) -> str:
        return _numbered(question.response for question in self.questions)


def _numbered(lines) -> str:
    return "\n".join(f"{number}: {line}" for number, line in enumerate(lines, 1))


def training_item(family: str, rng: random.Random) -> Questionnaire:
    """Draw one for training; raises ValueError for an unknown family."""
    return _draw(family, rng, lambda: tasks.training_item(family, rng))


def held_out(family: str, count: int, seed: int = 0) -> list[Questionnaire]:
    """Draw `count` of the first `HELD_OUT_QUESTIONS` held-out questions, the same ones for the same seed.

    Raises ValueError for an unknown family.
    """
    pool = tasks.held_out(family, HELD_OUT_QUESTIONS, seed)
    rng = random.Random(f"questionnaires/{family}/{seed}")
    return [_draw(family, rng, lambda: rng.choice(pool)) for _ in range(count)]


def _draw(family: str, rng: random.Random, question: Callable[[], Task]) -> Questionnaire:
    first = question()  # which refuses an unknown family
    fewest, most = QUESTIONS[family]
    questions = {first.prompt: first}
    count = rng.randint(fewest, most)
    while len(questions) < count:
        another = question()
        if _options(another) == _options(first):
            questions.setdefault(another.prompt, another)
    return Questionnaire(family, tuple(questions.values()))


def _options(question: Task) -> str:
    """Of a choice; others have none."""
    return question.prompt.partition(" A: ")[2]


def score(item: Questionnaire, text: str) -> float:
    """The share of the questions that `text` answers right, 0 to 1: each in a line that begins with the question's
    number. Of lines with the same number the first counts."""
    answers = {}
    for line in text.strip().split("\n"):
        number, _, answer = line.partition(": ")
        answers.setdefault(number, answer)
    right = [tasks.is_correct(task, answers.get(str(number), "")) for number, task in enumerate(item.questions, 1)]
    return sum(right) / len(right)


def is_correct(item: Questionnaire, text: str) -> bool:
    """Whether `text` answers every question right, in order and with no line besides."""
    numbers = [line.partition(": ")[0] for line in text.strip().split("\n")]
    return numbers == [str(number) for number, _ in enumerate(item.questions, 1)] and score(item, text) == 1
