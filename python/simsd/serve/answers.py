"""From updates and results to OpenAI's answers: whole ones, and chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence

from simsd.engine.request import Update
from simsd.models.tokenizer import Tokenizer
from simsd.results import Result
from simsd.serve.errors import APIError
from simsd.serve.logprobs import Candidates, chat_logprobs, completion_logprobs
from simsd.serve.requests import Ask

# What ended a text, in OpenAI's words; `ended_by` of a choice has ours. What was cut short is "length" there.
FINISH_REASONS = {"end": "stop", "stop": "stop", "length": "length", "deadline": "length", "cancelled": "length"}


class Answer:
    """One request's answer as it comes in: give it every (choice, update).

    Attributes:
        results: by choice, as far as they are done. new_tokens: of all choices so far.
    """

    def __init__(self, ask: Ask, tokenizer: Tokenizer, model: str) -> None:
        self.ask, self.tokenizer = ask, tokenizer
        self.results: list[Result | None] = [None] * len(ask.choices)
        self.new_tokens = 0
        kind = "chat.completion" if ask.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if ask.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"{kind}.chunk" if ask.stream and ask.chat else kind,
            "created": int(time.time()),
            "model": model,
        }
        self._begun = [False] * len(ask.choices)
        self._characters = [0] * len(ask.choices)  # of the tokens that logprobs were sent for
        self._shown: list[list[str | None]] = [[] for _ in ask.choices]  # of the block on its way

    def take(self, choice: int, update: Update) -> None:
        """Raises APIError where the choice has failed."""
        self.new_tokens += len(update.tokens)
        if update.result is None:
            return
        if update.result.finish_reason == "failed":
            raise APIError(500, f"choice {choice} failed: {update.result.error}", code="generation_failed")
        self.results[choice] = update.result

    def chunks(self, choice: int, update: Update) -> Iterator[dict]:
        """What an update is to the reader of a stream. Raises APIError where the choice has failed."""
        self.take(choice, update)
        if not self._begun[choice]:
            self._begun[choice] = True
            yield from self._first(choice)
        logprobs = self._logprobs(choice, update) if self.ask.logprobs and update.tokens else None
        if update.text or logprobs is not None:
            yield self._chunk(choice, update.text, logprobs=logprobs)
        if update.result is not None:
            yield self._chunk(choice, "", **self._ending(update.result))
        elif self.ask.provisional and (shown := self._provisional(update)) != self._shown[choice]:
            self._shown[choice] = shown
            yield self._chunk(choice, "", provisional=shown)

    def last(self) -> dict:
        """The chunk with the usage."""
        return self._head | {"choices": [], "usage": self.usage()}

    def whole(self) -> dict:
        choices = []
        for index, result in enumerate(self.results):
            text = self.ask.echoes[self.ask.prompt_of(index)] + result.text
            message = {"role": "assistant", "content": text, "refusal": None}
            choice = {"index": index, **({"message": message} if self.ask.chat else {"text": text})}
            choice["logprobs"] = self._whole_logprobs(index, result) if self.ask.logprobs else None
            choices.append(choice | self._ending(result))
        return self._head | {"choices": choices, "usage": self.usage()}

    def usage(self) -> dict:
        """Of an answer that is complete: tokens of the prompts, once each, and of all choices, end tokens included."""
        prompt, samples = sum(map(len, self.ask.prompts)), len(self.ask.choices) // len(self.ask.prompts)
        cached = sum(result.stats.cached_tokens for result in self.results[::samples])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.new_tokens,
            "total_tokens": prompt + self.new_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _first(self, choice: int) -> Iterator[dict]:
        if self.ask.chat:
            yield self._chunk(choice, "", delta={"role": "assistant", "content": ""})
        elif echo := self.ask.echoes[self.ask.prompt_of(choice)]:
            yield self._chunk(choice, echo, logprobs=self._of_prompt(choice) if self.ask.logprobs else None)

    def _chunk(self, choice: int, text: str, **more: object) -> dict:
        content = {"delta": {"content": text} if text else {}} if self.ask.chat else {"text": text}
        made = {"index": choice} | content | {"logprobs": None, "finish_reason": None} | more
        chunk = self._head | {"choices": [made]}
        return chunk | {"usage": None} if self.ask.include_usage else chunk

    def _ending(self, result: Result) -> dict:
        ending = {
            "finish_reason": FINISH_REASONS[result.finish_reason],
            "ended_by": result.finish_reason,
            "seed": result.seed,
        }
        if self.ask.step_map:
            ending |= {"token_ids": result.tokens, "step_map": result.step_map}
        return ending

    def _provisional(self, update: Update) -> list[str | None]:
        """Each position's text by itself, None where masked."""
        return [None if token is None else self.tokenizer.decode([token]) for token in update.provisional]

    def _logprobs(self, choice: int, update: Update) -> dict:
        return self._shaped(choice, update.tokens, update.logprobs, update.top_logprobs)

    def _whole_logprobs(self, choice: int, result: Result) -> dict:
        echo = self.ask.echoes[self.ask.prompt_of(choice)]
        before = self._of_prompt(choice) if echo else {}
        behind = self._shaped(choice, result.tokens, result.logprobs, result.top_logprobs)
        return {name: before[name] + behind[name] for name in behind} if echo else behind

    def _of_prompt(self, choice: int) -> dict:
        prompt = self.ask.prompts[self.ask.prompt_of(choice)]
        return self._shaped(choice, prompt, [None] * len(prompt))

    def _shaped(
        self,
        choice: int,
        tokens: Sequence[int],
        logprobs: Sequence[float | None],
        candidates: Sequence[Candidates] = (),
    ) -> dict:
        """`candidates`: the most probable tokens at each place, best first; none, where nobody counted them."""
        most = [others[: self.ask.top_logprobs] for others in candidates or [()] * len(tokens)]
        if self.ask.chat:
            return chat_logprobs(self.tokenizer, tokens, logprobs, most)
        shaped = completion_logprobs(self.tokenizer, tokens, logprobs, most, self._characters[choice])
        self._characters[choice] += sum(map(len, shaped["tokens"]))
        return shaped
