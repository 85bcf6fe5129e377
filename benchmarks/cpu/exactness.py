"""Exact decoding against native decoding, token for token: the proof of `verify="exact"`.

Every prompt is decoded natively, alone, once per sampling setting, and exactly under every setting of
exactness_settings.py. A comparison is one prompt under one setting: the tokens, the step map (which denoising step
revealed each token) and the reason why the text ended must be the same. There is no retry and no allowance for near
ties. Probabilities are compared bit for bit as well and counted on their own. A setting under which no drafted token
was accepted proves nothing, nor does a crowded one in which nothing was shared or no request was driven out; it is
flagged and not counted.

In the mixed batches of exactness_mixed.py each request has settings of its own and joins a running engine. A comparison
is one request; it may be one that is itself decoded natively, in the batch. Temporal requests among them are compared
with the same request alone, and counted on their own.

Fails on a difference. The quick selection is about 440 comparisons of 20,000: a few prompts per setting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from simsd import Decoder, GenerationConfig, Metrics, Result

from ..contest import Bench
from ..report import Table
from .exactness_mixed import Mix, decode_mix, mixes, temporal_alone
from .exactness_settings import UNPROMISED, Setting, model, prompts, settings

SELECTIONS = ("full", "quick")
COLUMNS = [
    *(("setting", "{name}"), ("compared", "{comparisons}"), ("differ", "{differ}")),
    *(("probabilities differ", "{probs_differ}"), ("accepted / drafted", "{accepted} / {drafted}")),
    ("forwards", "{forwards_ratio:.2f}"),
]
DIFFERENCES = Table(
    [(name, f"{{{name}}}") for name in ("setting", "prompt", "position", "what", "native", "exact")], "Differences:"
)


@dataclass(frozen=True)
class Difference:
    """The first place where a prompt's exact text is not its native one; `what` is "token", "step" or "end"."""

    setting: str
    prompt: int
    what: str
    position: int
    native: int | str | None
    exact: int | str | None

    def __str__(self) -> str:
        return (
            f"DIFFERENT: {self.setting}, prompt {self.prompt}, position {self.position}: "
            f"{self.what} {self.native} natively, {self.exact} exactly"
        )


@dataclass
class Outcome:
    """A setting's comparisons.

    Attributes:
        temporal: requests in the same batches that are not exact, compared with the same request alone. Not among
            `comparisons`, nor in what follows but `probs_differ` and `differences`.
        probs_differ: prompts of which a probability is not the same bit for bit.
        cancelled: prompts cancelled on their way; what they had then is compared with native's beginning.
        tokens: generated; drafted, accepted: tokens that the target judged, and took.
        with_drafts: prompts of which at least one drafted token was accepted.
        forwards, native_forwards: of the target, prefill excluded.
        cached: prompt tokens whose keys and values were there already. preemptions: times that a request was driven out
            of memory, to be computed anew.
    """

    setting: Setting | Mix
    differences: list[Difference] = field(default_factory=list)
    comparisons: int = 0
    temporal: int = 0
    probs_differ: int = 0
    cancelled: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    with_drafts: int = 0
    forwards: int = 0
    native_forwards: int = 0
    cached: int = 0
    preemptions: int = 0
    seconds: float = 0.0

    @property
    def proves(self) -> bool:
        crowded = isinstance(self.setting, Mix) and self.setting.crowded
        return self.accepted > 0 and not (crowded and 0 in (self.cached, self.preemptions))

    def see(self, number: int, native: Result, exact: Result, cancelled: bool) -> Difference | None:
        self.comparisons += 1
        self.cancelled += exact.finish_reason == "cancelled"
        self.tokens += len(exact.tokens)
        self.drafted += exact.stats.drafted
        self.accepted += exact.stats.accepted
        self.with_drafts += exact.stats.accepted > 0
        self.forwards += exact.stats.target_forwards
        self.native_forwards += native.stats.target_forwards
        return self._compare(self.setting.name, number, native, exact, cancelled)

    def see_temporal(self, number: int, alone: Result, result: Result, cancelled: bool) -> Difference | None:
        self.temporal += 1
        return self._compare(f"{self.setting.name}, temporal", number, alone, result, cancelled)

    def _compare(self, setting: str, number: int, native: Result, exact: Result, cancelled: bool) -> Difference | None:
        self.cached += exact.stats.cached_tokens
        self.probs_differ += exact.probs != native.probs[: len(exact.probs)]
        found = difference(setting, number, native, exact, cancelled)
        if found is not None:
            self.differences.append(found)
        return found

    def __str__(self) -> str:
        text = f"{self.setting.name}: {self.comparisons} compared, {len(self.differences)} differ"
        text += f" ({self.probs_differ} in probabilities), {self.accepted} of {self.drafted} drafted tokens accepted"
        text += f", {self.cancelled} cancelled" if self.cancelled else ""
        text += f", {self.temporal} temporal" if self.temporal else ""
        text += f", {self.cached} prompt tokens shared, {self.preemptions} preemptions" if self.preemptions else ""
        return text + ("" if self.proves else " - PROVES NOTHING") + f", {self.seconds:.1f} s"

    def to_dict(self) -> dict:
        names = ("comparisons", "temporal", "probs_differ", "cancelled", "tokens", "drafted", "accepted", "with_drafts")
        more = ("forwards", "native_forwards", "cached", "preemptions", "proves")
        counts = {name: getattr(self, name) for name in (*names, *more)}
        name = self.setting.name + ("" if self.proves else " (proves nothing: not counted)")
        name += f" ({self.cancelled} cancelled)" if self.cancelled else ""
        name += f" ({self.temporal} temporal beside them)" if self.temporal else ""
        if self.preemptions:
            name += f" ({self.cached} prompt tokens shared, {self.preemptions} preemptions)"
        setting = {"group": self.setting.group, "setting": self.setting.name, "name": name, "batch": self.setting.batch}
        forwards = {"forwards_ratio": self.forwards / self.native_forwards} if self.native_forwards else {}
        return setting | counts | forwards | {"differ": len(self.differences), "seconds": round(self.seconds, 2)}


def difference(setting: str, number: int, native: Result, exact: Result, cancelled: bool) -> Difference | None:
    """None where the two are the same, or where `exact` was to be cancelled, is, and is a beginning of `native`."""
    cancelled = cancelled and exact.finish_reason == "cancelled"
    for what, ours, theirs in (
        ("token", exact.tokens, native.tokens),
        ("step", exact.step_map, native.step_map),
    ):
        theirs = theirs[: len(ours)] if cancelled else theirs
        for position in range(max(len(ours), len(theirs))):
            pair = [values[position] if position < len(values) else None for values in (theirs, ours)]
            if pair[0] != pair[1]:
                return Difference(setting, number, what, position, *pair)
    if not cancelled and exact.finish_reason != native.finish_reason:
        return Difference(setting, number, "end", len(exact.tokens), native.finish_reason, exact.finish_reason)
    return None


def native_config(config: GenerationConfig, seed: int) -> GenerationConfig:
    """Native decoding with the same sampling; what only concerns drafts falls back to its default, so that settings
    that differ in nothing else share their native texts."""
    neutral = GenerationConfig()
    names = ("drafter", "lookahead", "max_rows", "order_sharpness", "draft_steps")
    return replace(config, verify="none", seed=seed, **{name: getattr(neutral, name) for name in names})


class Natives:
    """Native results, each decoded alone, once."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, int, GenerationConfig], Result] = {}

    def __call__(self, target: str, number: int, config: GenerationConfig, seed: int) -> Result:
        key = target, number, native_config(config, seed)
        if key not in self.known:
            (self.known[key],) = decode(Decoder(model(target), [prompts(target)[number]], None, key[2], max_batch=1))
        return self.known[key]

    def counts(self) -> dict[str, int]:
        texts = {(target, number, tuple(result.tokens)) for (target, number, _), result in self.known.items()}
        return {"decoded": len(self.known), "distinct": len(texts)}


def decode(decoder: Decoder, cancel: Iterable[int] = ()) -> list[Result]:
    """All results; the sequences `cancel` are cancelled after their first tokens, unless these are the last ones."""
    cancel = set(cancel)
    for update in decoder:
        if update.index in cancel and update.tokens and update.result is None:
            decoder.cancel(update.index)
    return decoder.results()


def compare(
    setting: Setting | Mix, natives: Natives, see: Callable[[Difference | None], None] = lambda _: None
) -> Outcome:
    """Decodes and compares; `see` is called once per comparison."""
    began = time.perf_counter()
    outcome = Outcome(setting)
    compared = run_mix if isinstance(setting, Mix) else run_setting
    for found in compared(setting, natives, outcome):
        see(found)
    outcome.seconds = time.perf_counter() - began
    return outcome


def run_setting(setting: Setting, natives: Natives, outcome: Outcome) -> Iterator[Difference | None]:
    draft = None if setting.draft is None else model(setting.draft)
    wanted = [prompts(setting.target)[number] for number in setting.numbers]
    seeds = [setting.seed(number) for number in setting.numbers]
    cancel = range(4, len(wanted), setting.cancel_every) if setting.cancel_every else ()
    decoder = Decoder(model(setting.target), wanted, draft, setting.config, seeds=seeds, max_batch=setting.batch)
    exact = decode(decoder, cancel)
    for i, (number, seed, result) in enumerate(zip(setting.numbers, seeds, exact, strict=True)):
        native = natives(setting.target, number, setting.config, seed)
        yield outcome.see(number, native, result, i in cancel)


def run_mix(mix: Mix, natives: Natives, outcome: Outcome) -> Iterator[Difference | None]:
    def measured(metrics: Metrics) -> None:
        outcome.preemptions += metrics.preemptions

    for job, result in decode_mix(mix, measured):
        cancelled = job.cancel is not None
        if cancelled and result.finish_reason == "cancelled" and not result.tokens:
            continue  # nothing to compare
        if job.config.verify == "temporal":
            yield outcome.see_temporal(job.number, temporal_alone(mix, job), result, cancelled)
        else:
            native = natives(mix.target, job.number, job.config, job.config.seed)
            yield outcome.see(job.number, native, result, cancelled)


def every_setting(quick: bool = False) -> list[Setting | Mix]:
    """Settings and mixes; those of which the same bits are not promised come last."""
    return sorted([*settings(quick), *mixes(quick)], key=lambda setting: setting.group == UNPROMISED)


def compare_all(chosen: list[Setting | Mix], natives: Natives, report: Callable[[str], None] = print) -> list[Outcome]:
    """Each setting and each difference is reported in a line."""
    outcomes = []
    for n, setting in enumerate(chosen, 1):
        outcomes.append(compare(setting, natives, lambda found: found is not None and report(str(found))))
        report(f"{n}/{len(chosen)} {outcomes[-1]}")
    return outcomes


def totals(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """Sums over the settings that prove something; `unproved` counts the comparisons of the others. Differences are
    summed over all."""
    outcomes = list(outcomes)
    proving = [outcome for outcome in outcomes if outcome.proves]
    names = ("comparisons", "temporal", "probs_differ", "cancelled", "tokens", "drafted", "accepted")
    names += ("forwards", "native_forwards", "cached", "preemptions")
    sums = {name: sum(getattr(outcome, name) for outcome in proving) for name in names}
    return sums | {
        "settings": len(proving),
        "differ": sum(len(outcome.differences) for outcome in outcomes),
        "unproved": sum(outcome.comparisons for outcome in outcomes if not outcome.proves),
    }


def summary(sums: dict[str, int]) -> str:
    text = (
        f"{sums['comparisons']:,} comparisons under {sums['settings']} settings: {sums['differ']:,} differ;"
        f" probabilities differ in a bit in {sums['probs_differ']:,}; {sums['accepted']:,} of {sums['drafted']:,}"
        f" drafted tokens accepted, {sums['forwards']:,} target forwards for native's {sums['native_forwards']:,}."
    )
    if sums["temporal"]:
        text += f" {sums['temporal']:,} temporal requests beside them, compared with themselves alone, are not counted."
    if sums["preemptions"]:
        text += f" {sums['cached']:,} prompt tokens were shared, {sums['preemptions']:,} times a request made room."
    if sums["unproved"]:
        text += f" {sums['unproved']:,} more, under settings that prove nothing, are not counted."
    return text


def run(bench: Bench, selection: str, only: str) -> None:
    """`only`: settings whose group or name contains this."""
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")
    natives = Natives()
    chosen = [s for s in every_setting(selection == "quick") if only in s.group or only in s.name]
    outcomes = compare_all(chosen, natives)
    promised = totals(outcome for outcome in outcomes if outcome.setting.group != UNPROMISED)
    others = totals(outcome for outcome in outcomes if outcome.setting.group == UNPROMISED)
    bench.figures = {"totals": promised, "totals_not_promised": others, "native_texts": natives.counts()}
    bench.note(
        summary(promised)
        + " They rest on {decoded:,} native texts, {distinct:,} of them distinct.".format(**natives.counts())
    )
    bench.note(
        "A comparison is one prompt under one setting: tokens, step map and the reason of its end, exact against native"
        " decoding of the prompt alone. No retries, no allowance for near ties. Forwards are the target's, prefill"
        " excluded, in parts of native's."
    )
    bench.note(
        "In mixed batches it is one request among others, each with settings of its own; one in ten is itself decoded"
        " natively, there."
    )
    if others["settings"] or others["unproved"]:
        bench.note(
            f"{UNPROMISED}: {summary(others)} Not part of the count above: as loaded, a row's logits need not be the"
            " same bits beside other rows (experts run on as many rows as chose them; SiLU rounds the elements behind"
            " the last whole vectors differently; a BLAS goes by the number of rows). The other models are loaded"
            " `deterministic`."
        )
    for outcome in outcomes:
        group = outcome.setting.group
        bench.row(Table(COLUMNS, f"{group[0].upper()}{group[1:]}:"), **outcome.to_dict())
    for found in (found for outcome in outcomes for found in outcome.differences):
        bench.row(DIFFERENCES, **vars(found))
    if promised["differ"]:
        raise RuntimeError(f"{promised['differ']} texts differ")
