"""One request on its way: what is committed, how it came, and when it ends. Host side only."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence as Seq

from simsd.config import STRATEGIES, SamplingParams
from simsd.decode import draft, rows, slots
from simsd.decode.exchange import ORIGINS, SlotReport
from simsd.errors import one_line
from simsd.models.tokenizer import Tokenizer
from simsd.results import Result, Stats
from simsd.text import AnswerText

NOT_FINITE = "the target's logits were not finite"
MAX_FAILURES = 3  # errors in a row, in what a request takes part in, before it is given up


@dataclasses.dataclass(frozen=True)
class Update:
    """News of one request.

    Attributes:
        index: the request's number: what `Engine.add` returned; in `simsd.stream` that of its prompt, or with n samples
            per prompt, prompt * n + sample.
        tokens: ids newly committed; they never change again.
        provisional: the block on its way behind them, as far as the text may go, None where masked. Under
            `verify="exact"` and "none" what is revealed there stays, too, except that the text may end before it.
        text: newly certain text, None without a tokenizer. All of a request's are together its result's text; a
            character is never split, and what may still become a stop string is held back.
        result: the result, once the request is done.
        logprobs, top_logprobs: of `tokens`, as `Result` has them.
    """

    index: int
    tokens: list[int]
    provisional: list[int | None]
    text: str | None = None
    result: Result | None = None
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)


class Request:
    """Tokens, step map, probabilities and origins of one prompt, cut at the first end token, stop string or the
    limit.

    Attributes:
        behind: (token, step, log-probability of the draw) of what was decided behind the text's end, from there on.
    """

    def __init__(
        self,
        index: int,
        prompt: list[int],
        params: SamplingParams,
        seed: int,
        end_ids: tuple[int, ...],
        tokenizer: Tokenizer | None,
        priority: int = 0,
        deadline: float = math.inf,
    ) -> None:
        """`params.seed` is not looked at: `seed` is the one to use. `priority`: the lowest is served first. `deadline`:
        by `time.perf_counter`."""
        self.index, self.prompt, self.params, self.seed = index, prompt, params, seed
        self.end_ids, self.tokenizer = end_ids, tokenizer
        self.priority, self.deadline = priority, deadline
        self.limit = len(prompt) + params.max_new_tokens
        self.tokens = list(prompt)
        self.steps: list[int] = []
        self.probs: list[float] = []
        self.logprobs: list[float] = []
        self.draw_logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []  # of each token; of none where they are not asked for
        self.behind: list[tuple[int, int, float]] = []
        self.block_length = 1  # of the model, once an iteration has brought tokens
        self.origins: list[str] = []
        self.answer = None if tokenizer is None else AnswerText(tokenizer, params.stop)
        self.provisional: list[int | None] = []
        self.finish_reason: str | None = None if params.max_new_tokens else "length"
        self.error: str | None = None
        self.failures = 0  # errors since its last iteration that went well
        self.delivered = 0  # generated tokens that updates have brought
        self.reported = False  # its last update is out
        self.stats = Stats()
        self.arrived = time.perf_counter()
        self.began: float | None = None
        self.delivered_at: float | None = None  # when an update last brought tokens

    def slot_settings(
        self, block_length: int, epoch: int, stop_ids: int, sub_blocks: Seq[int] = ()
    ) -> dict[str, object]:
        """The packed fields of a slot that the request fixes; of its end tokens the first `stop_ids`: the host looks
        for all of them. `sub_blocks`: the lengths of those of a block."""
        params = self.params
        counts = params.reveal_counts(block_length, sub_blocks)
        begins = sum(1 << position for position in itertools.accumulate(sub_blocks[:-1]))
        bounded = params.strategy == "entropy_bounded"
        sharpness = params.order_sharpness
        ends = list(self.end_ids[:stop_ids])
        return {
            "end": rows.aligned(self.limit, block_length),
            "prompt_len": len(self.prompt),
            "request_epoch": epoch,
            "seed": self.seed,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "strategy": STRATEGIES.index(params.strategy),
            "end_gate": params.end_gate,
            "threshold": params.entropy_bound if bounded else params.threshold,
            "schedule": counts + [0] * (block_length - len(counts)),
            "steps": len(counts),
            "sub_blocks": begins - (begins >> 63 << 64),  # as int64
            "stop_ids": ends + [slots.NO_STOP_ID] * (stop_ids - len(ends)),
            "order_sharpness": draft.DEFAULT_SHARPNESS if sharpness is None else (sharpness,) * 3,
        }

    @property
    def new(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    def learn(self, report: SlotReport, drafted: int, block_length: int) -> None:
        """Takes over what an iteration did in the request's slot, `drafted` forwards of the draft model among it."""
        self.touch()
        if report.states > 1 or self.params.verify == "temporal":
            self.stats.target_verify_forwards += 1
        else:
            self.stats.target_denoise_forwards += 1
        self.stats.draft_denoise_forwards += drafted
        self.stats.drafted += report.judged
        self.stats.accepted += report.accepted
        self.failures = 0
        self.block_length = block_length
        if report.failed:
            self.fail(NOT_FINITE)
        for block in report.blocks:
            if self.finish_reason is None:
                known = len(self.tokens) % block_length
                origins = [ORIGINS[origin] for origin in block.origins[known:]]
                self.stats.bonus += origins.count("bonus")
                new = (column[known:] for column in (block.tokens, block.steps, block.probs, block.draw_logprobs))
                logprobs, tops = (x and x[known:] for x in (block.logprobs, block.tops))
                self.commit(*new, origins, logprobs, tops)
        self.provisional = report.provisional[len(self.tokens) % block_length :]

    def stumble(self, error: str) -> None:
        """What it took part in raised. Whose error it was is not known: those who have had some in a row run alone
        before they are given up."""
        self.failures += 1
        if self.failures >= MAX_FAILURES:
            self.fail(error)

    @property
    def runs_alone(self) -> bool:
        return self.failures == MAX_FAILURES - 1

    def is_over(self, now: float) -> bool:
        """Whether it has ended; past its deadline, it does so here."""
        if self.finish_reason is None and self.deadline <= now:
            self.stop(None, "deadline")
        return self.finish_reason is not None

    def fail(self, error: str) -> None:
        if self.finish_reason is None:
            self.finish_reason, self.error = "failed", error

    def give_up_text(self, error: str) -> None:
        """Ends it where its text cannot be decoded; all its tokens are kept."""
        self.finish_reason, self.error = "failed", error
        self.answer.give_up(len(self.new))

    def close(self) -> None:
        """Its last update is out."""
        self.reported = True

    def commit(
        self,
        tokens: Seq[int],
        steps: Seq[int],
        probs: Seq[float],
        draw_logprobs: Seq[float],
        origins: Seq[str],
        logprobs: Seq[float] | None = None,
        tops: Seq[Seq[tuple[int, float]]] | None = None,
    ) -> None:
        """Appends what was decided, as far as it belongs to the answer (up to an end token or the limit).

        `logprobs`: None: the logarithms of `probs`. `tops`: ids and how far each one's logarithm is above the token's.
        """
        keep = min(len(tokens), self.limit - len(self.tokens))
        end = next((i for i, token in enumerate(tokens[:keep]) if token in self.end_ids), None)
        if end is not None:
            keep = end + 1
        self.behind = list(zip(tokens[keep:], steps[keep:], draw_logprobs[keep:], strict=True))
        # Tokens come last: an interrupt in between leaves no token without the rest.
        self.steps += steps[:keep]
        self.probs += probs[:keep]
        logprobs = [math.log(prob) for prob in probs[:keep]] if logprobs is None else logprobs[:keep]
        self.logprobs += logprobs
        if tops is not None:
            for own, ranked in zip(logprobs, tops, strict=False):
                self.top_logprobs.append([(token, min(own + margin, 0.0)) for token, margin in ranked])
        self.draw_logprobs += draw_logprobs[:keep]
        self.origins += origins[:keep]
        self.tokens += tokens[:keep]
        self._end()

    def _end(self) -> None:
        """Sets the reason where the last token ends the text."""
        if len(self.tokens) > len(self.prompt) and self.tokens[-1] in self.end_ids:
            self.finish_reason = "end"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"

    def mend(self) -> None:
        """After an interrupt in the middle of `commit`: what has no token goes, and the text ends where it should."""
        self._cut(len(self.new))
        if self.finish_reason is None:
            self._end()
        if self.finish_reason is None:
            self.behind = []  # of what never came

    def stop(self, count: int | None, reason: str) -> None:
        """Ends the text behind its first `count` generated tokens (all, if None)."""
        count = len(self.steps) if count is None else count
        if self.finish_reason is None or count < len(self.steps):
            self.finish_reason = reason
        if self.answer is not None and count < len(self.answer.tokens):
            self.answer.cut(count)
        self._cut(count)

    def _cut(self, count: int) -> None:
        cut = zip(self.new[count:], self.steps[count:], self.draw_logprobs[count:], strict=False)
        self.behind = [*cut, *self.behind]
        del self.tokens[len(self.prompt) + count :]
        columns = self.steps, self.probs, self.logprobs, self.draw_logprobs, self.top_logprobs, self.origins
        for column in columns:
            del column[count:]

    def settle(self) -> None:
        """Brings the text up to the tokens; ends the request where its first stop string is complete."""
        if self.answer is None or self.answer.given_up:
            return
        known = len(self.prompt) + len(self.answer.tokens)
        self.answer.push(self.tokens[known:], last=self.finish_reason is not None)
        if self.answer.ended:
            self.finish_reason = "stop"
            self._cut(len(self.answer.tokens))

    @property
    def unsettled(self) -> bool:
        """Whether what is committed may yet be cut: it holds a stop string, but one that begins before may come."""
        return self.answer is not None and self.answer.settled < len(self.answer.tokens)

    def take(self) -> tuple[list[int], str | None]:
        """The settled tokens and text that no update has brought."""
        self.settle()
        new = self.new if self.answer is None else self.new[: self.answer.settled]
        new = new[self.delivered :]
        self.delivered += len(new)
        return new, None if self.answer is None else self.answer.take()

    def update(self) -> Update:
        """The next one: the last where it has ended."""
        try:
            tokens, text = self.take()
        except Exception as error:  # its tokenizer's
            self.give_up_text(f"the text cannot be decoded: {one_line(error)}")
            tokens, text = self.take()
        news = slice(self.delivered - len(tokens), self.delivered)
        told = self.logprobs[news], self.top_logprobs[news]
        if self.finish_reason is not None:
            return Update(self.index, tokens, [], text, self.result(), *told)
        ahead = [] if self.unsettled else self.provisional[: self.limit - len(self.tokens)]
        end = next((i for i, token in enumerate(ahead) if token in self.end_ids), len(ahead) - 1)
        return Update(self.index, tokens, ahead[: end + 1], text, None, *told)

    def touch(self) -> None:
        """Brings the running time up to now."""
        now = time.perf_counter()
        self.began = now if self.began is None else self.began
        self.stats.total_seconds = now - self.began

    def result(self) -> Result:
        self.settle()
        new, text = self.new, None
        self.stats.new_tokens = len(new)
        # Of whole blocks that were cut nothing in the text depends.
        cut = [] if self.finish_reason is None else self.behind  # in the middle of `commit` it may be there before
        cut = cut[: rows.aligned(len(self.tokens), self.block_length) - len(self.tokens)]
        if self.answer is not None:
            text = self.tokenizer.decode(new) if self.finish_reason is None else self.answer.text
        return Result(
            tokens=new,
            text=text,
            step_map=self.steps[: len(new)],
            probs=self.probs[: len(new)],
            origins=self.origins[: len(new)],
            finish_reason=self.finish_reason or "interrupted",
            prompt_tokens=list(self.prompt),
            stats=self.stats,
            logprobs=self.logprobs[: len(new)],
            draw_logprobs=self.draw_logprobs[: len(new)],
            top_logprobs=self.top_logprobs[: len(new)],
            cut_tokens=[token for token, _, _ in cut],
            cut_step_map=[step for _, step, _ in cut],
            cut_draw_logprobs=[logprob for _, _, logprob in cut],
            seed=self.seed,
            error=self.error,
        )
