"""What to generate and how: frozen dataclasses, checked when they are made."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from simsd.errors import SimsdError
from simsd.values import is_integer, is_list, plain

STRATEGIES = ("sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded")
VERIFIERS = ("exact", "temporal", "none")
DRAFTERS = ("auto", "model", "self", "lookup")
RULES = ("match", "mrs")
REJECTED_TAILS = ("truncate", "truncate_no_bonus", "target_argmax", "target_argmax_all", "draft_argmax")
MAX_BLOCK_LENGTH = 64  # a revealed set is one int64 bitmask
MAX_LOOKAHEAD = 16
MAX_TOP_LOGPROBS = 20
INT32_MAX = 2**31 - 1
# Logits divided by it stay finite in float32: those of float16 models (65504 at most) and far beyond.
MIN_TEMPERATURE = 1e-30
MAX_FLOAT32 = 3.4028234663852886e38
MAX_BATCH = 8
_OF_A_BLOCK = ("steps", "draft_steps", "sub_block_length")  # at most the block length
# The settings that are numbers >= 0, and the largest value of each.
_NUMBERS = {
    "threshold": 1.0,
    "entropy_bound": MAX_FLOAT32,
    "temperature": MAX_FLOAT32,
    "top_p": 1.0,
    "order_sharpness": MAX_FLOAT32,
    "end_gate": 1.0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What one request may ask for; requests of one engine may differ in all of it. A bad value raises `SimsdError`
    with the allowed ones. Numbers may be numpy's or torch's, lists may be arrays or tensors; kept are Python's ints,
    floats and tuples.

    Attributes:
        max_new_tokens: tokens to return at most; whole blocks are decoded and the last one is cut.
        steps: denoising steps T per block, 1 <= T <= block length; None for one token per step.
        sub_block_length: positions of a sub-block: a step reveals some of the leftmost one that has any masked. The
            block length for none, None for the model's own. Each has steps of its own among T, at least one;
            `entropy_bounded` needs one per token then.
        strategy: which masked positions a step reveals (SDAR's four rules).
        threshold: probability above which `low_confidence_dynamic` reveals a position.
        entropy_bound: nats that one step of `entropy_bounded` may spend.
        temperature: 0 is greedy; statistics and confidences are then taken at temperature 1. Else 1e-30 or more.
        top_k: ids kept before drawing (ties with the k-th stay), 0 for all.
        top_p: probability mass kept before drawing, 1.0 for all.
        seed: of the counter-based noise; None draws one from the operating system. `Result.seed` tells which it was.
            Equal seed, prompt and settings give equal texts, whatever else is in the batch.
        stop: strings before the first of which, by its place in the text, the text ends, or one string. They are looked
            for in the text of committed tokens, in which special tokens have none (see `end_token_ids`), and where they
            stand in it does not depend on tokens, blocks or who drafts. `Result.tokens` goes on to the token that
            completes the stop string.
        verify: how a draft is checked: "exact" (the text is native decoding's, token for token), "temporal" (SimSD as
            published, an approximation) or "none" (plain native decoding).
        drafter: who drafts for "exact": "model" (the draft model), "self" (the target's own logits for the state
            before), "lookup" (the text itself: what followed the last tokens where they stood before in it, the prompt
            included; "self" where they did not) or "auto" (whichever pays, block by block, or none; without a draft
            model "self" or "lookup"). Never changes the text.
        order_sharpness: how far the draft's confidence is believed to tell the order in which the target reveals: a
            position that it ranks x lower in log-odds is exp(-order_sharpness * x) times as likely to be next. Large
            values leave a chain of states, 0 takes every order for equally likely. None: 0.25 for the draft model, 1
            for the target's own logits. A lookup ranks each position 1 lower than the one before it; None: 0.25.
        accept: "match" (the target's own token, greedy or with shared noise) or "mrs" (modified rejection sampling,
            "temporal" only).
        rejected_tail: what becomes of a drafted block after its first rejected position, "temporal" only:
            "truncate" keeps accepted + bonus, "truncate_no_bonus" drops the bonus unless it is the only token,
            "target_argmax" fills the rest with the target's tokens, "target_argmax_all" also replaces the accepted
            ones, "draft_argmax" keeps the draft's tokens after the bonus.
        draft_steps: denoising steps, a forward each, that the draft takes per block. None: 1 for "exact", whose draft
            proposes what is left from the last of them; all for "temporal", where positions that the draft never
            reveals take the target's token and do not count as drafted.
        end_gate: least target probability with which an end token may arrive as bonus (0 disables), "temporal" only.
        end_token_ids: ids that end the text (or one id), None for the target's own; () never ends.
    """

    max_new_tokens: int = 256
    steps: int | None = None
    sub_block_length: int | None = None
    strategy: str = "low_confidence_static"
    threshold: float = 0.85
    entropy_bound: float = 0.5
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = 0
    stop: str | Sequence[str] = ()
    verify: str = "exact"
    drafter: str = "auto"
    order_sharpness: float | None = None
    accept: str = "match"
    rejected_tail: str = "truncate"
    draft_steps: int | None = None
    end_gate: float = 0.0
    end_token_ids: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        _plain_values(self)
        _one_of("strategy", self.strategy, STRATEGIES)
        _one_of("verify", self.verify, VERIFIERS)
        _one_of("drafter", self.drafter, DRAFTERS)
        _one_of("accept", self.accept, RULES)
        _one_of("rejected_tail", self.rejected_tail, REJECTED_TAILS)
        integer("max_new_tokens", self.max_new_tokens, 0)
        for name in _OF_A_BLOCK:
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), 1, getattr(self, "block_length", None) or MAX_BLOCK_LENGTH)
        integer("top_k", self.top_k, 0)
        object.__setattr__(self, "top_k", min(self.top_k, INT32_MAX))  # more than there can be
        for name, high in _NUMBERS.items():
            if getattr(self, name) is not None or name != "order_sharpness":
                _number(name, getattr(self, name), high)
                object.__setattr__(self, name, float(getattr(self, name)))
        if self.top_p == 0.0:
            raise SimsdError("top_p must be above 0 (1.0 keeps every token), got 0.0")
        self._refuse_temporal_settings()
        self._set_lists()

    def _set_lists(self) -> None:
        """Checks what may be a list, and keeps it as a tuple."""
        self._set_seed()
        ends = (self.end_token_ids,) if is_integer(self.end_token_ids) else self.end_token_ids
        if ends is not None:
            ends = _tuple("end_token_ids", ends, "a list of token ids")
            for token in ends:
                integer("end_token_ids", token, 0, INT32_MAX)
        stop = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        stop = _tuple("stop", stop, "a list of strings")
        if not all(isinstance(string, str) and string for string in stop):
            raise SimsdError(f"stop must be a list of strings, none of them empty, got {self.stop!r:.80}")
        for name, value in (("end_token_ids", ends), ("stop", stop)):
            object.__setattr__(self, name, value)

    def _set_seed(self) -> None:
        if self.seed is not None:
            integer("seed", self.seed, -(2**63), 2**63 - 1, "an integer {} or None")

    def _refuse_temporal_settings(self) -> None:
        """An exact verifier that took them silently would not do what was asked."""
        if self.verify != "exact":
            return
        for name, value, neutral in (
            ("accept", self.accept, "match"),
            ("rejected_tail", self.rejected_tail, "truncate"),
            ("end_gate", self.end_gate, 0.0),
        ):
            if value != neutral:
                raise SimsdError(f"{name}={value!r} is a setting of verify='temporal'; got verify='exact'")

    @property
    def asks_draft_model(self) -> bool:
        """Whether a draft model, where there is one, may draft."""
        return self.verify == "temporal" or (self.verify == "exact" and self.drafter in ("auto", "model"))

    @property
    def needs_draft_model(self) -> bool:
        """Whether nobody else may."""
        return self.verify == "temporal" or (self.verify == "exact" and self.drafter == "model")

    def block_steps(self, block_length: int) -> int:
        """Denoising steps T for a block of `block_length`; raises where more were asked for than a block has."""
        for name in _OF_A_BLOCK:
            value = getattr(self, name)
            if value is not None and value > block_length:
                raise SimsdError(f"{name} must be at most the block length {block_length}, got {value}")
        return self.steps or block_length

    def reveal_counts(self, block_length: int, sub_blocks: Sequence[int] = ()) -> list[int]:
        """n[s] for s in 0..T-1, the positions of each denoising step: L // T, the remainder to the early steps.

        `sub_blocks` of these lengths have steps of their own, longer ones more, so that all but the last are full
        before the last step, which reveals whatever is masked.

        Raises:
            SimsdError: there are fewer steps than that takes, or more than a block has positions.
        """
        steps, lengths = self.block_steps(block_length), list(sub_blocks) or [block_length]
        if steps < len(lengths):
            raise SimsdError(f"steps must be at least {len(lengths)}, the sub-blocks of a block, got {steps}")
        if steps < block_length and len(lengths) > 1 and self.strategy == "entropy_bounded":
            raise SimsdError(
                f"strategy='entropy_bounded' needs a step per token of a block with sub-blocks: leave steps out or give"
                f" {block_length}, got {steps}"
            )
        shares = [1] * len(lengths)
        for _ in range(steps - len(lengths)):
            shares[max(range(len(lengths)), key=lambda k: lengths[k] / shares[k])] += 1
        pairs = zip(lengths, shares, strict=True)
        return [length // share + (step < length % share) for length, share in pairs for step in range(share)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What is fixed for all requests of an engine.

    Attributes:
        block_length: tokens per block, None for the target's own.
        lookahead: blocks that one exact verification may go through, the current one included; "auto" takes fewer where
            that pays.
        max_rows: rows that one exact verification may add for drafted states, over the whole batch (rows of current
            states and of commits come on top); None for what the measured time of a row is worth.
        max_batch: requests to decode at a time; texts do not depend on it.
        max_queue: requests that may wait, besides as many as there are free slots; None: any number.
        max_length: tokens of the longest sequence, its prompt included; None: 4096, or what the models' positions allow
            where that is less.
        kv_memory: bytes for keys and values of committed tokens, of both models; None: for max_batch times max_length
            tokens, or 90% of what is free where that is less. Requests wait for memory, and the youngest makes room for
            the others and is computed anew later, where it runs out: texts do not depend on it.
        page_size: tokens of the pages that memory is shared out in: 16, 32, 64, 128 or 256.
        prefix_cache: whether requests share the keys and values of equal beginnings, whole pages and blocks of them,
            which stay after a request until their memory is needed. Texts do not depend on it.
        prefill_rows: prompt tokens that an iteration computes at most: longer prompts are computed in chunks of as
            many, beside what the others decode.
        draft_device: where the draft model works beside the target, on what this may ask next while it verifies: a
            device of the target's kind ("cuda:1"), or the target's own, on a stream ("cuda:0") or a thread ("cpu") of
            its own. None: on the target's device, in its turn. Texts of exact verification do not depend on it.
        top_logprobs: ids, 0 to 20, that `Result.top_logprobs` tells of each token: the most probable ones under the
            target at the state at which the token was revealed.
        order_head: a file of `simsd train-order` for the target and the block length L, which tells the order in which
            the target goes on from what it saw; "auto": order-L.safetensors beside the target's weights, where it is
            there; "none". Texts do not depend on it.
    """

    block_length: int | None = None
    lookahead: int = 2
    max_rows: int | None = None
    max_batch: int = MAX_BATCH
    max_queue: int | None = None
    max_length: int | None = None
    prefill_rows: int = 2048
    kv_memory: int | None = None
    page_size: int = 64
    prefix_cache: bool = True
    draft_device: str | None = None
    top_logprobs: int = 0
    order_head: str | os.PathLike[str] = "auto"

    def __post_init__(self) -> None:
        _plain_values(self)
        integer("lookahead", self.lookahead, 1, MAX_LOOKAHEAD)
        integer("max_batch", self.max_batch, 1)
        integer("prefill_rows", self.prefill_rows, MAX_BLOCK_LENGTH if self.block_length is None else self.block_length)
        if self.block_length is not None:
            integer("block_length", self.block_length, 1, MAX_BLOCK_LENGTH)
        if self.max_length is not None:
            integer("max_length", self.max_length, 1)
        if self.max_queue is not None:
            integer("max_queue", self.max_queue, 0)
        if self.kv_memory is not None:
            integer("kv_memory", self.kv_memory, 1)
        integer("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        integer("page_size", self.page_size, 16, 256)
        if self.page_size & (self.page_size - 1):
            raise SimsdError(f"page_size must be 16, 32, 64, 128 or 256, got {self.page_size}")
        if not isinstance(self.prefix_cache, bool):
            raise SimsdError(f"prefix_cache must be True or False, got {self.prefix_cache!r:.80}")
        if self.draft_device is not None and not (isinstance(self.draft_device, str) and self.draft_device):
            raise SimsdError(
                f'draft_device must be the name of a device, "cuda:1" say, or None, got {self.draft_device!r:.80}'
            )
        if not isinstance(self.order_head, str | os.PathLike) or not os.fspath(self.order_head):
            what = "auto, none or a file of simsd train-order"
            raise SimsdError(f"order_head must be {what}, got {self.order_head!r:.80}")
        object.__setattr__(self, "order_head", os.fspath(self.order_head))
        if self.max_rows is not None:
            integer("max_rows", self.max_rows, 0)
            object.__setattr__(self, "max_rows", min(self.max_rows, INT32_MAX))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig(EngineConfig, SamplingParams):
    """Settings of one generation: those of `SamplingParams`, the same for every prompt, and those of `EngineConfig`.

    Attributes:
        seed: an int for every prompt, one int per prompt, or None, which draws one for each prompt from the operating
            system.
        n: samples per prompt. Sample 0 has the prompt's seed, sample i the seed Philox(seed, i) (see
            `simsd.seeds.sample_seed`). Results come prompt by prompt: sample i of prompt p is number p * n + i.
    """

    seed: int | Sequence[int] | None = 0
    n: int = 1

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        SamplingParams.__post_init__(self)
        integer("n", self.n, 1)

    def _set_seed(self) -> None:
        seed = _tuple("seed", self.seed, "a list of integers") if is_list(self.seed) else self.seed
        for value in seed if isinstance(seed, tuple) else () if seed is None else (seed,):
            integer("seed", value, -(2**63), 2**63 - 1, "an integer {}, one per prompt, or None")
        object.__setattr__(self, "seed", seed)

    def engine(self, **changes: Any) -> EngineConfig:
        return EngineConfig(**_fields_of(EngineConfig, self) | changes)

    def sampling(self, seed: int | None) -> SamplingParams:
        return SamplingParams(**_fields_of(SamplingParams, self) | {"seed": seed})

    def seeds(self, prompts: int) -> list[int]:
        """The seed of every sample of `prompts` prompts, prompt by prompt."""
        from simsd.seeds import fresh_seed, sample_seed  # loads torch, which the command line's help does without

        if self.seed is None:
            seeds = [fresh_seed() for _ in range(prompts)]
        elif isinstance(self.seed, int):
            seeds = [self.seed] * prompts
        else:
            seeds = list(self.seed)
        if len(seeds) != prompts:
            raise SimsdError(f"seed must be one int or one per prompt: got {len(seeds)} seeds for {prompts} prompts")
        return [sample_seed(seed, i) for seed in seeds for i in range(self.n)]


Config = TypeVar("Config", EngineConfig, SamplingParams, GenerationConfig)


def config_with(
    config: object, settings: Mapping[str, Any], others: Sequence[str] = (), kind: type[Config] = GenerationConfig
) -> Config:
    """`config` (of `kind`, a dict of its fields, or None: the defaults) with `settings` in place of its own. A
    `GenerationConfig` is taken for what of it `kind` has.

    Args:
        others: names that a caller takes besides settings, for the sake of those who misspell them.

    Raises:
        SimsdError: an unknown setting, with those that it may have been meant for; a bad value; no config.
    """
    if isinstance(config, GenerationConfig) and kind is not GenerationConfig:
        config = config.engine() if kind is EngineConfig else config.sampling(config.seed)
    if config is not None and not isinstance(config, kind | Mapping):
        given = f"{type(config).__module__.partition('.')[0]}.{type(config).__qualname__}"
        raise SimsdError(f"config must be a simsd.{kind.__name__}, a dict of settings or None, got {given}")
    names = [field.name for field in dataclasses.fields(kind)]
    given = config if isinstance(config, Mapping) else {}
    for name in (*given, *settings):
        if name not in names:
            raise SimsdError(f"unknown setting {name!r}: {_meant(str(name), [*names, *others])}")
    if isinstance(config, kind):
        return dataclasses.replace(config, **settings) if settings else config
    return kind(**{**given, **settings})


def _meant(name: str, names: Sequence[str]) -> str:
    """The names close to `name`, or all of them."""
    close = [other for other in names if other.startswith(name) or name.startswith(other + "_")]
    close = close or difflib.get_close_matches(name, names)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}"


def _one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise SimsdError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def integer(name: str, value: object, low: int, high: int | None = None, form: str = "an integer {}") -> None:
    """Raises SimsdError where `value` is none from `low` to `high`; `form` says what is asked for, {} the bounds."""
    if not is_integer(value) or value < low or (high is not None and value > high):
        bounds = f">= {low}" if high is None else f"in {low}..{high}"
        raise SimsdError(f"{name} must be {form.format(bounds)}, got {value!r}")


def _number(name: str, value: object, high: float) -> None:
    allowed = f"a number in 0..{high:g}"
    if name == "temperature":
        allowed = f"0 (greedy) or in {MIN_TEMPERATURE:g}..{high:g}, so that logits divided by it are finite in float32"
    is_number = is_integer(value) or isinstance(value, float)
    if not is_number or not 0 <= value <= high or (name == "temperature" and 0 < value < MIN_TEMPERATURE):
        raise SimsdError(f"{name} must be {allowed}, got {value!r}")


def _tuple(name: str, value: object, allowed: str) -> tuple:
    if not is_list(value):
        raise SimsdError(f"{name} must be {allowed}, got {value!r:.80}")
    return tuple(plain(item) for item in value)


def _plain_values(config: object) -> None:
    for field in dataclasses.fields(config):
        object.__setattr__(config, field.name, plain(getattr(config, field.name)))


def _fields_of(kind: type, config: object) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(kind)}
