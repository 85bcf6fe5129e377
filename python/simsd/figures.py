"""The figures of a benchmark: from measurements to sums, ratios and the cost model's bound."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from simsd.benchmarking import MODES, NATIVE, BatchMeasurement, Measurement
from simsd.config import GenerationConfig
from simsd.engine.pair import block_length
from simsd.models.loading import LoadedModel
from simsd.results import Stats


@dataclasses.dataclass(frozen=True)
class Figures:
    """One mode on some items, one at a time; None where there is nothing to divide.

    Attributes:
        accuracy: share of questions answered right, mean of items.
        same_text: share of items whose tokens are native's.
        acceptance: accepted share of drafted tokens.
        target_forwards_per_token: prefill excluded; forwards_ratio: that over native's.
        draft_forwards_ratio: draft forwards per token over native's target forwards per token.
        tokens_per_second: by wall time, with prefill; speedup: that over native's.
        bound_tokens_per_second: tokens / (target forwards x target forward time + draft forwards x draft forward time),
            forward times those of one block's rows alone (medians over the items): what a loop would reach whose
            additional rows, sampling and bookkeeping cost nothing. bound_share: the share of it that was reached.
    """

    items: int
    tokens: float
    accuracy: float | None
    same_text: float | None
    acceptance: float | None
    target_forwards_per_token: float | None
    forwards_ratio: float | None
    draft_forwards_ratio: float | None
    tokens_per_second: float | None
    speedup: float | None
    bound_tokens_per_second: float | None
    bound_share: float | None


@dataclasses.dataclass(frozen=True)
class Throughput:
    """One mode on some items, several at a time. `speedup`: over native at this batch size; `over_one`: over the same
    mode one at a time; `same_text`: share of items whose tokens are native's at this batch size."""

    items: int
    tokens: float
    tokens_per_second: float | None
    speedup: float | None
    over_one: float | None
    same_text: float | None


@dataclasses.dataclass(frozen=True)
class Group:
    """Some items: figures by mode, throughput by batch size and mode, milliseconds of a forward of one block's rows."""

    name: str
    items: int
    modes: dict[str, Figures]
    batches: dict[int, dict[str, Throughput]]
    target_forward_ms: float | None
    draft_forward_ms: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """`families` in the order measured; `pooled` sums over all items first (so it weighs by tokens); `mean` is the
    plain mean of the families' figures. `notes`: what to know of a mode under these settings."""

    families: list[Group]
    pooled: Group
    mean: Group
    target: str
    draft: str | None
    settings: dict[str, Any]
    notes: dict[str, str]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def summarise(
    measurements: Sequence[Measurement | BatchMeasurement],
    target: LoadedModel,
    draft: LoadedModel | None,
    config: GenerationConfig,
) -> Report:
    """The figures of what was measured, complete or not; at least one `Measurement`."""
    single = [m for m in measurements if isinstance(m, Measurement)]
    batched = [m for m in measurements if isinstance(m, BatchMeasurement)]
    names = list(dict.fromkeys(m.item.family for m in single))
    families = [
        group(name, [m for m in single if m.item.family == name], [m for m in batched if m.items[0].family == name])
        for name in names
    ]
    modes = list(single[0].results)
    settings = dataclasses.asdict(config)
    for name in ("verify", "accept", "drafter"):  # the modes' own
        del settings[name]
    settings["block_length"] = block_length(target, draft, config)
    settings["steps"] = config.block_steps(settings["block_length"])
    settings["modes"] = {mode: MODES[mode] for mode in modes}
    settings["batches"] = [1, *dict.fromkeys(m.batch for m in batched)]
    notes = {}
    if "temporal-mrs" in modes and config.temperature == 0:
        notes["temporal-mrs"] = "at temperature 0 modified rejection sampling is the rule match: temporal once more"
    return Report(
        families=families,
        pooled=group("all items", single, batched),
        mean=mean(families),
        target=target.name,
        draft=None if draft is None else draft.name,
        settings=settings,
        notes=notes,
        machine=machine(target),
    )


def group(name: str, single: Sequence[Measurement], batched: Sequence[BatchMeasurement] = ()) -> Group:
    """The figures of some items, from sums over them."""
    by_mode = {mode: figures(mode, single) for mode in single[0].results}
    batches: dict[int, dict[str, Throughput]] = {}
    for batch in sorted({m.batch for m in batched}):
        runs = [m for m in batched if m.batch == batch]
        names = {m.items[0].family for m in runs}  # of an interrupted run, not all of them
        alike = [m for m in single if m.item.family in names]
        batches[batch] = {mode: throughput(mode, runs, figures(mode, alike)) for mode in by_mode}
    target_forward, draft_forward = forward_seconds(single)
    return Group(
        name=name,
        items=len(single),
        modes=by_mode,
        batches=batches,
        target_forward_ms=1e3 * target_forward,
        draft_forward_ms=None if draft_forward is None else 1e3 * draft_forward,
    )


def figures(mode: str, measurements: Sequence[Measurement]) -> Figures:
    stats, native = (sum((m.results[name].stats for m in measurements), Stats()) for name in (mode, NATIVE))
    seconds, native_seconds = (sum(m.seconds[name] for m in measurements) for name in (mode, NATIVE))
    target_forward, draft_forward = forward_seconds(measurements)
    bound_seconds = stats.target_forwards * target_forward + stats.draft_forwards * (draft_forward or 0.0)
    graded = [m for m in measurements if m.item.grade is not None]
    right = sum(m.item.grade(m.results[mode].text or "") for m in graded)
    same = sum(m.results[mode].tokens == m.results[NATIVE].tokens for m in measurements)
    forwards, native_forwards = (_ratio(s.target_forwards, s.new_tokens) for s in (stats, native))
    speed, bound = _ratio(stats.new_tokens, seconds), _ratio(stats.new_tokens, bound_seconds)
    return Figures(
        items=len(measurements),
        tokens=stats.new_tokens,
        accuracy=_ratio(right, len(graded)),
        same_text=_ratio(same, len(measurements)),
        acceptance=stats.acceptance,
        target_forwards_per_token=forwards,
        forwards_ratio=_ratio(forwards, native_forwards),
        draft_forwards_ratio=_ratio(_ratio(stats.draft_forwards, stats.new_tokens), native_forwards),
        tokens_per_second=speed,
        speedup=_ratio(speed, _ratio(native.new_tokens, native_seconds)),
        bound_tokens_per_second=bound,
        bound_share=_ratio(speed, bound),
    )


def forward_seconds(measurements: Sequence[Measurement]) -> tuple[float, float | None]:
    """Median seconds of a forward of one block's rows in the target and the draft (None: there is none)."""
    drafted = [m.draft_forward_seconds for m in measurements if m.draft_forward_seconds is not None]
    target = statistics.median(m.target_forward_seconds for m in measurements)
    return target, statistics.median(drafted) if drafted else None


def throughput(mode: str, runs: Sequence[BatchMeasurement], one_at_a_time: Figures) -> Throughput:
    speed, native = (
        _ratio(sum(len(r.tokens) for m in runs for r in m.results[name]), sum(m.seconds[name] for m in runs))
        for name in (mode, NATIVE)
    )
    pairs = [pair for m in runs for pair in zip(m.results[mode], m.results[NATIVE], strict=True)]
    return Throughput(
        items=len(pairs),
        tokens=sum(len(result.tokens) for result, _ in pairs),
        tokens_per_second=speed,
        speedup=_ratio(speed, native),
        over_one=_ratio(speed, one_at_a_time.tokens_per_second),
        same_text=_ratio(sum(result.tokens == other.tokens for result, other in pairs), len(pairs)),
    )


def mean(groups: Sequence[Group]) -> Group:
    """The plain mean of each figure; `items` is the sum."""
    measured = [g.batches for g in groups]
    batches = sorted({batch for of_group in measured for batch in of_group})
    modes = list(groups[0].modes)
    return Group(
        name="mean of families",
        items=sum(g.items for g in groups),
        modes={mode: _mean_of(Figures, [g.modes[mode] for g in groups]) for mode in modes},
        batches={
            batch: {mode: _mean_of(Throughput, [b[batch][mode] for b in measured if batch in b]) for mode in modes}
            for batch in batches
        },
        target_forward_ms=_mean([g.target_forward_ms for g in groups]),
        draft_forward_ms=_mean([g.draft_forward_ms for g in groups]),
    )


def _mean_of(kind: type, rows: Sequence[Any]) -> Any:
    names = [field.name for field in dataclasses.fields(kind) if field.name != "items"]
    return kind(items=sum(row.items for row in rows), **{n: _mean([getattr(row, n) for row in rows]) for n in names})


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def machine(target: LoadedModel) -> dict[str, Any]:
    """What the figures were measured on and with."""
    import transformers

    import simsd_kernels
    from simsd_kernels import dispatch, info

    cpu = info.collect()["cpu"]
    gpu = torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else None
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu["name"],
        "cores": cpu["cores"],
        "threads": cpu["threads"],
        "gpu": gpu,
        "device": target.device.type,
        "dtype": str(target.dtype).removeprefix("torch."),
        "compiled_ops": dispatch.load_library() is None,
        "backend": os.environ.get("SIMSD_BACKEND", "auto"),
        "simsd_kernels": simsd_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
