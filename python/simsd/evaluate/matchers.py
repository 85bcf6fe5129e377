"""Whether a text gives an answer: a few plain rules for question/answer files."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

from simsd.errors import SimsdError

Matcher = Callable[[str, str], bool]

# A minus behind a digit, a letter or a bracket is a subtraction's. Digits in threes may have commas.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])-?\.\d+")
_ANSWERED = re.compile(r"\banswer(?:\s+is)?\s*:?\s*\**\(?([A-Z])\b", re.IGNORECASE)
_LETTER = re.compile(r"\(?([A-Z])(?:[).:]|$)")


def exact(text: str, answer: str) -> bool:
    """The whole text is the answer, but for white space around it."""
    return text.strip() == answer.strip()


def contains(text: str, answer: str) -> bool:
    """The answer stands in the text as a word or words of its own, in upper or lower case: "paris" in "It is Paris.",
    not "5" in "15"."""
    text, answer = (" ".join(part.casefold().split()) for part in (text, answer))
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None


def number(text: str, answer: str) -> bool:
    """The last number in the text is the answer's: "23+45=68. So 68 apples." gives 68; 1,250.0 is 1250."""
    return _last_number(text) == _last_number(answer) is not None


def choice(text: str, answer: str) -> bool:
    """The letter that the text chooses: that of its last "ANSWER: B" or "the answer is (B)", else the one that it
    starts with ("B", "(B)", "B. Paris")."""
    return _letter(text) == answer.strip().upper()


def regex(pattern: str) -> Matcher:
    """A matcher: the last match of the pattern in the text, its group where it has one, is the answer but for white
    space around both. Raises SimsdError where the pattern is none, or has several groups."""
    try:
        compiled = re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise SimsdError(f"--pattern {pattern!r} is no regular expression: {error}") from None
    if compiled.groups > 1:
        raise SimsdError(f"--pattern {pattern!r} has {compiled.groups} groups: keep one, write (?:...) for others")

    def matches(text: str, answer: str) -> bool:
        found = [match[compiled.groups] for match in compiled.finditer(text)]
        return bool(found) and found[-1] is not None and found[-1].strip() == answer.strip()

    return matches


PLAIN: dict[str, Matcher] = {"exact": exact, "contains": contains, "number": number, "choice": choice}
NAMES = (*PLAIN, "regex")


def matcher(name: str, pattern: str | None = None) -> Matcher:
    """The matcher of a name, one of NAMES; `pattern` is that of "regex". Raises SimsdError for another name, a pattern
    too few or too many."""
    if name not in NAMES:
        raise SimsdError(f"--match must be one of {', '.join(NAMES)}; got {name!r}")
    if (name == "regex") != (pattern is not None):
        given = f"--match {name} with {'no --pattern' if pattern is None else f'--pattern {pattern!r}'}"
        raise SimsdError(f"a pattern goes with regex, as in --match regex --pattern 'ANSWER: (.*)'; got {given}")
    return PLAIN[name] if pattern is None else regex(pattern)


def obstacle(name: str, answer: str) -> str | None:
    """Why no text can match this answer; None where one can."""
    if not answer.strip():
        return "the answer is empty"
    if name == "number" and _last_number(answer) is None:
        return f"the answer {answer!r} holds no number, which --match number compares"
    if name == "choice" and not re.fullmatch(r"\s*[A-Za-z]\s*", answer):
        return f"the answer {answer!r} is no letter, which --match choice compares"
    return None


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def _letter(text: str) -> str | None:
    if named := _ANSWERED.findall(text):
        return named[-1].upper()
    start = _LETTER.match(text.strip())
    return start[1] if start else None
