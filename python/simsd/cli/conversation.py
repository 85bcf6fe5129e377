"""What a chat knows, and its commands. Nothing here reads or writes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from simsd.cli.steps import counts, statistics
from simsd.config import SamplingParams
from simsd.errors import SimsdError
from simsd.results import Stats

if TYPE_CHECKING:
    from simsd.results import Result

OFF = "off"
COMMANDS = {
    "/system": ("[TEXT]", f"sets the system turn, {OFF} removes it; alone: shows it"),
    "/reset": ("", "forgets what was said"),
    "/seed": ("[N]", "sets the seed of the noise; alone: shows it"),
    "/stats": ("", "tokens, forwards, acceptance and speed, of the last answer and of all"),
    "/help": ("", "this list"),
    "/exit": ("", "ends the chat"),
}
HELP = "\n".join(f"{f'{name} {arguments}':<15}{what}" for name, (arguments, what) in COMMANDS.items())


@dataclasses.dataclass
class Conversation:
    """
    Attributes:
        system: the system turn, None for none. seed: of every answer. temperature: of the answers, which `/seed` tells
            of.
        remembers: whether the model is shown earlier turns.
        turns: (question, answer), the oldest first.
        last: the last answer. total, answers: of all answers, those before a reset among them.
        over: whether `/exit` was said.
    """

    system: str | None = None
    seed: int = 0
    temperature: float = 0.0
    remembers: bool = True
    turns: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    last: Result | None = None
    total: Stats = dataclasses.field(default_factory=Stats)
    answers: int = 0
    over: bool = False

    def messages(self, question: str, left_out: int = 0) -> list[dict[str, str]]:
        """The chat that asks the question; the oldest `left_out` turns are not in it."""
        said = [("system", self.system)] if self.system else []
        for asked, answered in self.turns[left_out:]:
            said += [("user", asked), ("assistant", answered)]
        return [{"role": role, "content": content} for role, content in (*said, ("user", question))]

    def learn(self, question: str, result: Result, left_out: int = 0) -> None:
        """Takes over an answer, as far as it came; the turns that its question was asked without are gone."""
        self.last, self.total, self.answers = result, self.total + result.stats, self.answers + 1
        del self.turns[:left_out]
        if self.remembers and result.text and result.finish_reason != "failed":
            self.turns.append((question, result.text))

    def command(self, line: str) -> str:
        """Does what a line that begins with a slash says; returns what to tell.

        Raises:
            SimsdError: there is no such command, or not with that behind it.
        """
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name not in COMMANDS:
            names = ", ".join(COMMANDS)
            raise SimsdError(f"unknown command {name}: there are {names}; with a space before it, it is text")
        if rest and not COMMANDS[name][0]:
            raise SimsdError(f"{name} takes nothing behind it, got {rest!r:.80}")
        match name:
            case "/system":
                return self._system(rest)
            case "/reset":
                return self._reset()
            case "/seed":
                return self._seed(rest)
            case "/stats":
                return self._stats()
            case "/exit":
                self.over = True
                return ""
        return HELP

    def _system(self, text: str) -> str:
        if text:
            self.system = None if text == OFF else text
        return "no system turn" if self.system is None else f"system turn: {self.system}"

    def _reset(self) -> str:
        self.turns.clear()
        done = "forgotten" if self.remembers else "nothing to forget: this model is asked each question by itself"
        return f"{done}; the system turn stays: {self.system}" if self.system else done

    def _seed(self, text: str) -> str:
        if text:
            try:
                self.seed = SamplingParams(seed=int(text)).seed
            except ValueError:  # a SimsdError is one
                raise SimsdError(f"/seed takes an integer in -2^63..2^63-1, got {text!r:.80}") from None
        return f"seed {self.seed}" + ("" if self.temperature else "; at temperature 0 it changes nothing")

    def _stats(self) -> str:
        if self.last is None:
            return "no answer yet"
        lines = [f"last answer: {statistics(self.last)}"]
        if self.answers > 1:
            lines.append(f"all {self.answers} answers: {counts(self.total, f'{self.total.new_tokens} tokens')}")
        return "\n".join(lines)
