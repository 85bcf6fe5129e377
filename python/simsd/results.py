"""What a generation returns: tokens, text, where each token came from, and what it cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from simsd.config import MAX_BLOCK_LENGTH
from simsd.errors import SimsdError
from simsd.values import is_integer

# Fields since results were first written.
_ADDED = ("draw_logprobs", "cut_tokens", "cut_step_map", "cut_draw_logprobs", "top_logprobs")
_DERIVED = ("target_forwards", "draft_forwards", "acceptance", "tokens_per_second")


@dataclasses.dataclass
class Stats:
    """Counts and seconds of one prompt's generation; forwards are model calls that it took part in, by kind.

    A prompt's own rows ride along with the first forward that it needs; prefill forwards are those that only commit
    (the chunks of a long prompt). Denoise forwards see current states alone, verify forwards drafted ones too.
    `drafted` and `accepted` count tokens that the target judged, positions past an end token or the length limit
    included; `total_seconds` run from the prompt's entry into the batch to its last token. `cached_tokens` of the
    prompt needed no forward: an engine had their keys and values.
    """

    target_prefill_forwards: int = 0
    target_denoise_forwards: int = 0
    target_verify_forwards: int = 0
    draft_prefill_forwards: int = 0
    draft_denoise_forwards: int = 0
    drafted: int = 0
    accepted: int = 0
    bonus: int = 0
    total_seconds: float = 0.0
    new_tokens: int = 0
    cached_tokens: int = 0

    @property
    def target_forwards(self) -> int:
        """Target forwards without prefill."""
        return self.target_denoise_forwards + self.target_verify_forwards

    @property
    def draft_forwards(self) -> int:
        """Draft forwards without prefill."""
        return self.draft_denoise_forwards

    @property
    def acceptance(self) -> float | None:
        """Share of drafted tokens that the target accepted; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.new_tokens / self.total_seconds if self.total_seconds else None

    def __add__(self, other: Stats) -> Stats:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Stats(*(a + b for a, b in pairs))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in _DERIVED}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Stats:
        """What `to_dict` gave, also by way of JSON. Raises SimsdError where a count is missing or unknown."""
        return cls(**_fields(cls, values, ignored=_DERIVED))


@dataclasses.dataclass
class Result:
    """One prompt's generation.

    Attributes:
        tokens: generated ids; the first end token, if any, is the last one, and so is the one that completes the first
            stop string.
        text: the tokens as text without special tokens, up to the first stop string (None where the model came without
            a tokenizer).
        step_map: for each token the denoising step that revealed it in its block, 1-based;
            T + 1 where the draft never drafted it and the target filled it in.
        probs: each token's probability under the target when it was revealed: softmax(logits / temperature), at
            temperature 0 softmax(logits), over all ids but those that are never generated. Top-k and top-p filter
            afterwards, so a token that they leave alone keeps the probability that it had. The same in every mode; in
            "temporal" the logits are those of its verification.
        logprobs: the natural logarithms of the same. They are taken of the float32 probability, which resolves 6e-8
            below 1; a "tail" token, whose probability may vanish, has its own from the logits.
        draw_logprobs: each token's log-probability, in nats, under the distribution that it was drawn from: the
            target's after temperature, never-generated ids, top-k and top-p; 0 at temperature 0, where the draw is
            certain. In "temporal" of what the rule finally drew from: the target's distribution as verified for
            "drafted", "bonus" and "undrafted", but 0 for what an argmax put there ("undrafted" under "mrs", a token in
            a gated end token's place); a "tail" token has the draft's where it is the draft's, else as "undrafted".
        top_logprobs: for each token the `EngineConfig.top_logprobs` ids that were most probable when it was revealed,
            and their log-probabilities, of the same distribution and precision as `logprobs`: (id, log-probability),
            best first, equals by the lower id; the token itself is among them only if it is one of the best. Empty
            where they were not asked for.
        cut_tokens, cut_step_map, cut_draw_logprobs: the same of the last block behind the text's end, where the block
            was decided as a whole: what the text was drawn under, and the rest of the trajectory.
        origins: for each token how it came. Exact and native: "denoised" (revealed on the block's current state) or
            "drafted" (revealed ahead of it, on a drafted state). Temporal: "drafted" (accepted), "bonus", "undrafted"
            (filled by the target) or "tail" (what a rejected-tail policy put there).
        finish_reason: "end" (an end token), "length" (max_new_tokens), "stop" (a stop string or criterion),
            "cancelled", "deadline", "failed" (see `error`) or "interrupted".
        prompt_tokens: the prompt's ids.
        stats: forwards, acceptance, seconds.
        error: why it failed: the target's logits were not finite, its text could not be decoded, or iterations with it
            raised again and again.
        seed: of its noise. With it and the same prompt and settings the text comes again.
    """

    tokens: list[int]
    text: str | None
    step_map: list[int]
    probs: list[float]
    origins: list[str]
    finish_reason: str
    prompt_tokens: list[int]
    stats: Stats
    logprobs: list[float] = dataclasses.field(default_factory=list)
    draw_logprobs: list[float] = dataclasses.field(default_factory=list)
    cut_tokens: list[int] = dataclasses.field(default_factory=list)
    cut_step_map: list[int] = dataclasses.field(default_factory=list)
    cut_draw_logprobs: list[float] = dataclasses.field(default_factory=list)
    seed: int = 0
    error: str | None = None
    top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)

    def revealed_sets(self, block_length: int) -> list[int]:
        """For each of `tokens`, then of `cut_tokens`, the set of positions of its block that were revealed when it was
        drawn, as a bitmask: those of the prompt, and those with an earlier step. With the tokens it is the state that
        the target saw; its noise is keyed by it, too (by none, 0, under "sequential").

        Raises SimsdError for a result of "temporal": there tokens are drawn under drafted ones, which may be gone.
        """
        if not is_integer(block_length) or not 1 <= block_length <= MAX_BLOCK_LENGTH:
            raise SimsdError(f"block_length must be an integer in [1, {MAX_BLOCK_LENGTH}], got {block_length!r}")
        if foreign := sorted({*self.origins} - {"denoised", "drafted"}):
            raise SimsdError(f"a token that came as {foreign[0]!r} was not drawn under a set of revealed tokens")
        first, steps = len(self.prompt_tokens), [*self.step_map, *self.cut_step_map]
        sets = []
        for at, step in enumerate(steps):
            begin = (first + at) // block_length * block_length - first  # of the block; negative in the prompt's
            block = enumerate(range(begin, min(begin + block_length, len(steps))))
            sets.append(sum(1 << i for i, other in block if other < 0 or steps[other] < step))
        return sets

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which JSON can hold; `from_dict` reads them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"stats": self.stats.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Result:
        """What `to_dict` gave, also by way of JSON and by versions that lacked some fields, which are empty then.
        Raises SimsdError where a key is missing or unknown."""
        if isinstance(values, Mapping):
            values = dict.fromkeys(_ADDED, ()) | values
        fields = _fields(cls, values)
        fields |= {name: list(fields[name]) for name in _ADDED}
        fields["top_logprobs"] = [[tuple(pair) for pair in ranked] for ranked in fields["top_logprobs"]]
        return cls(**fields | {"stats": Stats.from_dict(fields["stats"])})


def _fields(kind: type, values: Mapping[str, Any], ignored: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a dataclass by the names of its fields, which must be those of `values` but for `ignored`."""
    if not isinstance(values, Mapping):
        raise SimsdError(f"{kind.__name__}.from_dict takes what to_dict gave, got {type(values).__name__}")
    names = [field.name for field in dataclasses.fields(kind)]
    missing = [name for name in names if name not in values]
    unknown = [str(name) for name in values if name not in (*names, *ignored)]
    for what, keys in (("lacks", missing), ("does not know", unknown)):
        if keys:
            raise SimsdError(f"{kind.__name__}.from_dict {what} {', '.join(keys)}: it takes what to_dict gave")
    return {name: values[name] for name in names}
