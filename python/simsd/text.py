"""The text of an answer whose tokens arrive bit by bit: whole characters, up to the first stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders give for the bytes of an unfinished character
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # a piece of SentencePiece's byte fallback


class GrowingText:
    """Decodes a growing list of tokens; every `push` returns the text that has become certain.

    Held back are the bytes of a character that is not finished and, with byte fallback, the bytes of a run that is not:
    one more byte may make all of it invalid. `rest()` ends it: all returned pieces together are the text of all tokens.
    A push decodes the last few tokens only.

    Args:
        tokenizer: `simsd.models.tokenizer.Tokenizer`.
    """

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.text = ""
        zero = tokenizer.backend.convert_tokens_to_ids("<0x00>")  # None, or the unknown token's, where there is none
        self._byte_fallback = zero is not None and tokenizer.backend.convert_ids_to_tokens(zero) == "<0x00>"
        # The tokens from `_anchor` on are decoded, `_shown` of whose text is out. Before `_next` all text is out: it is
        # the next anchor. Both lie between whole characters.
        self._anchor = self._next = 0
        self._shown = ""

    def push(self, tokens: Sequence[int]) -> str:
        self.tokens += tokens
        end = len(self.tokens) - self._unfinished_run()
        window = self.tokenizer.decode(self.tokens[self._anchor : end])
        certain = window.rstrip(REPLACEMENT)
        if not certain.startswith(self._shown):
            return ""
        new = certain[len(self._shown) :]
        self.text, self._shown = self.text + new, certain
        if certain == window:
            self._move(end)
        return new

    def rest(self) -> str:
        whole = self.tokenizer.decode(self.tokens)
        new = whole.removeprefix(self.text) if whole.startswith(self.text) else ""
        self.text += new
        return new

    def _move(self, end: int) -> None:
        """Decodes from fewer tokens on. Their text stands first in what is decoded from then on, and some decoders
        treat what comes first in a way of their own (they strip a space): it must be there."""
        shown = self.tokenizer.decode(self.tokens[self._next : end])
        if shown.strip():
            self._anchor, self._next, self._shown = self._next, end, shown

    def _unfinished_run(self) -> int:
        """How many tokens at the end are a run of fallback bytes, with the tokens without text in and behind it."""
        if not self._byte_fallback:
            return 0
        run = 0
        for count, token in enumerate(reversed(self.tokens[self._next :]), start=1):
            if _BYTE.fullmatch(self.tokenizer.backend.convert_ids_to_tokens(token) or ""):
                run = count
            elif self.tokenizer.decode([token]):
                break
        return run


class AnswerText:
    """The text of an answer as it grows, which ends before the first stop string.

    The first stop string is the one that begins first in the text. What may still become one is held back.

    Attributes:
        tokens: of the answer; where it has ended at a stop string, up to the one that completes it.
        settled: how many of them belong to the answer, whatever comes.
        ended: whether it has ended at a stop string, or was cut or given up.
        given_up: whether its text stops short of its tokens: they could not be decoded.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = ()) -> None:
        self._stop = stop
        self._growing = GrowingText(tokenizer)
        self.tokens = self._growing.tokens
        self.settled = 0
        self.ended = self.given_up = False
        self._final: str | None = None  # the text where it has ended
        self._safe = 0  # characters that stand before every stop string that there may be
        self._taken = 0

    @property
    def text(self) -> str:
        """Of the tokens, as far as it is certain; where the answer has ended, what stands before the stop string."""
        return self._growing.text if self._final is None else self._final

    def push(self, tokens: Sequence[int], last: bool = False) -> None:
        """Adds tokens; `last`: no more will come."""
        if self.ended or not (tokens or last):
            return
        self._growing.push(tokens)
        if last:
            self._growing.rest()
        found, open_ = first_stop(self.text, self._stop, self._safe)
        if found is None:
            self._safe, self.settled = len(self.text) if last else open_, len(self.tokens)
            return
        start, end = found
        self._safe, self.settled = start if last else min(start, open_), self._tokens_until(end)
        if self._safe == start:
            self._end(self.settled, self.text[:start])

    def take(self) -> str:
        """The text that was not taken yet and will stay."""
        new = self.text[self._taken : self._safe]
        self._taken = max(self._taken, self._safe)
        return new

    def cut(self, count: int) -> None:
        """Ends the answer behind its first `count` tokens."""
        self._end(count, self._growing.tokenizer.decode(self.tokens[:count]))

    def give_up(self, count: int) -> None:
        """Ends the answer of `count` tokens with the text that was certain; the tokenizer is not asked again."""
        self.settled, self._final, self.ended, self.given_up = count, self.text[: self._safe], True, True

    def _end(self, count: int, text: str) -> None:
        self.settled, self._safe, self._final, self.ended = count, len(text), text, True
        del self.tokens[count:]

    def _tokens_until(self, end: int) -> int:
        """The fewest tokens whose text has the first `end` characters."""
        decode, count = self._growing.tokenizer.decode, len(self.tokens)
        while count and decode(self.tokens[: count - 1])[:end] == self.text[:end]:
            count -= 1
        return count


def first_stop(text: str, stop: Sequence[str], start: int = 0) -> tuple[tuple[int, int] | None, int]:
    """The stop string that begins first in text[start:], and where more text may yet complete one.

    Returns:
        (begin, end) of the first one in `text` (the shortest of those that begin there), or None; and the first index
        at which `text` ends with the beginning of a stop string, else its length.
    """
    places = [(text.find(string, start), len(string)) for string in stop]
    found = min(((at, at + length) for at, length in places if at >= 0), default=None)
    longest = max(map(len, stop), default=0)
    tails = range(max(start, len(text) - longest + 1), len(text))
    open_ = next((at for at in tails if any(string.startswith(text[at:]) for string in stop)), len(text))
    return found, open_
