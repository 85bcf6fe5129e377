"""Native decoding beside its accelerations: the same target, prompts and run, every mode in turn."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from simsd import questionnaires, tasks
from simsd.config import GenerationConfig
from simsd.decode.rows import aligned, scratch_behind
from simsd.engine.decoder import Decoder
from simsd.engine.request import Update
from simsd.errors import SimsdError
from simsd.models.folders import LONG_PAIR
from simsd.models.loading import LoadedModel
from simsd.models.runner import ModelRunner
from simsd.results import Result
from simsd_kernels import INF

NATIVE = "native"
MODES: dict[str, dict[str, str]] = {
    NATIVE: {"verify": "none"},
    "temporal": {"verify": "temporal", "accept": "match"},
    "temporal-mrs": {"verify": "temporal", "accept": "mrs"},
    "exact-model": {"verify": "exact", "drafter": "model"},
    "exact-self": {"verify": "exact", "drafter": "self"},
    "exact-auto": {"verify": "exact", "drafter": "auto"},
}
NEED_A_DRAFT = ("temporal", "temporal-mrs", "exact-model")
ROUNDS = 2  # decodings of a family per mode and batch size above 1, the second in opposite order


@dataclasses.dataclass(frozen=True)
class Item:
    """One prompt. `grade`: the share of its questions that a text answers right, where answers are graded."""

    family: str
    prompt: str | list[dict[str, str]]
    grade: Callable[[str], float] | None = None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One item, decoded alone in every mode. `seconds`: wall time by mode; `*_forward_seconds`: of a forward of one
    block's rows, measured right after it (see `ForwardClock`)."""

    item: Item
    results: dict[str, Result]
    seconds: dict[str, float]
    target_forward_seconds: float
    draft_forward_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class BatchMeasurement:
    """All items of a family, decoded `batch` at a time in every mode; `seconds`: wall time by mode."""

    items: list[Item]
    batch: int
    results: dict[str, list[Result]]
    seconds: dict[str, float]


def task_items(families: Sequence[str], count: int, seed: int = 0, target: str | None = None) -> list[Item]:
    """`count` held-out items of each of the built-in task families: questionnaires for a `target` of the pair that is
    trained on these, single questions for all others."""
    _check_names("families", families, tasks.FAMILIES)
    if count < 1:
        raise SimsdError(f"items must be at least 1 per family, got {count}")
    kind, grade = (questionnaires, questionnaires.score) if target in LONG_PAIR else (tasks, tasks.is_correct)
    return [
        Item(family, item.prompt, functools.partial(grade, item))
        for family in families
        for item in kind.held_out(family, count, seed)
    ]


def choose_modes(names: Sequence[str] | None, has_draft: bool) -> list[str]:
    """The modes to compare, native first and always in; None: all that go without a draft model, if there is none."""
    if names is None:
        return [mode for mode in MODES if has_draft or mode not in NEED_A_DRAFT]
    _check_names("modes", names, MODES)
    if not has_draft and (lacking := [mode for mode in names if mode in NEED_A_DRAFT]):
        raise SimsdError(f"modes {', '.join(lacking)} need a draft model: name one with --draft")
    return [NATIVE, *(name for name in names if name != NATIVE)]


def _check_names(what: str, given: Sequence[str], known) -> None:
    if unknown := [name for name in given if name not in known]:
        raise SimsdError(f"{what} must be among {', '.join(known)}; got {', '.join(unknown) or 'none'}")
    if len(set(given)) != len(given) or not given:
        raise SimsdError(f"{what} must be named once each, got {', '.join(given) or 'none'}")


def mode_config(mode: str, config: GenerationConfig) -> GenerationConfig:
    """`config` as that mode decodes with it; settings of the temporal verifier are dropped elsewhere."""
    settings = {"accept": "match"} | MODES[mode]
    if settings["verify"] != "temporal":
        settings |= {"rejected_tail": "truncate", "end_gate": 0.0}
    return dataclasses.replace(config, **settings)


class ForwardClock:
    """Times a model's forward of the L rows of one block, logits for all of them, behind a given context: nothing else
    rides along and nothing is done with the logits."""

    REPEATS = 3

    def __init__(self, model: LoadedModel, length: int, capacity: int) -> None:
        scratch = scratch_behind(capacity, model.device)
        self.runner = ModelRunner(model, 1, scratch + length, scratch)
        for values in (self.runner.cache.keys, self.runner.cache.values):
            values.normal_()  # untouched zeros may all be one page of memory
        self.index = torch.arange(scratch + length, dtype=torch.int32, device=model.device)[None]
        self.rows = self.index[:, :length]
        self.tokens = self.rows.long() % model.vocab_size
        self.wanted = torch.arange(length, device=model.device)

    def seconds(self, context: int) -> float:
        """Median of a few forwards behind `context` tokens, one before them thrown away."""
        scratch, device = self.runner.scratch, self.runner.device
        birth = torch.where((self.index < context) | (self.index >= scratch), 0, INF).to(torch.int32)
        death = torch.full_like(birth, INF)
        clock, slots, positions = torch.zeros_like(self.rows), self.rows + scratch, self.rows + context
        taken = []
        for _ in range(1 + self.REPEATS):
            began = time.perf_counter()
            self.runner.forward(self.tokens, positions, slots, clock, birth, death, self.wanted)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - began)
        return statistics.median(taken[1:])


def compare(
    target: LoadedModel,
    draft: LoadedModel | None,
    items: Sequence[Item],
    config: GenerationConfig,
    modes: Sequence[str],
    batches: Sequence[int] = (1,),
) -> Iterator[Measurement | BatchMeasurement]:
    """Decodes every item in every mode, family by family: one at a time, then at each batch size above 1.

    One at a time, the modes take turns prompt by prompt, the first of them another one each time, so that the machine's
    moods hit all alike; each mode has one decoder for the family, which takes one prompt at a time. At a batch size
    above 1 a mode decodes all of a family's items at a stretch, ROUNDS times, in opposite orders of the modes.

    Everything is checked before anything is decoded, and a first round of all modes is thrown away as warm-up.
    """
    modes = choose_modes(list(modes), draft is not None)
    if not all(isinstance(batch, int) and batch >= 1 for batch in batches):
        raise SimsdError(f"batch sizes must be integers >= 1, got {', '.join(map(str, batches))}")
    batches = [batch for batch in batches if batch > 1]
    prompts = [target.encode_prompt(item.prompt) for item in items]
    configs = {mode: mode_config(mode, config) for mode in modes}
    seeds = config.seeds(len(items))

    def decoder(mode: str, chosen: Sequence[int], batch: int) -> Decoder:
        texts, noise = [prompts[i] for i in chosen], [seeds[i] for i in chosen]
        return Decoder(target, texts, draft, configs[mode], noise, max_batch=batch)

    everything = range(len(items))
    checked = [decoder(mode, everything, 1) for mode in modes]
    clocks = [ForwardClock(m, checked[0].block_length, checked[0].capacity) for m in (target, draft) if m is not None]

    for batch in (1, *batches):
        for mode in modes:
            _decode(decoder(mode, everything[:batch], batch))
    for turn, family in enumerate(dict.fromkeys(item.family for item in items)):
        chosen = [i for i in everything if items[i].family == family]
        updates = {mode: iter(decoder(mode, chosen, 1)) for mode in modes}
        for i in chosen:
            turns = {mode: _next_result(updates[mode]) for mode in _rotated(modes, i)}
            results, seconds = _columns(modes, turns)
            context = aligned(len(prompts[i]) + len(results[NATIVE].tokens) // 2, checked[0].block_length)
            yield Measurement(items[i], results, seconds, *(clock.seconds(context) for clock in clocks))
        for batch in batches:
            for again in range(ROUNDS):
                order = _rotated(modes, turn)[:: -1 if again % 2 else 1]
                turns = {mode: _decode(decoder(mode, chosen, batch)) for mode in order}
                yield BatchMeasurement([items[i] for i in chosen], batch, *_columns(modes, turns))


def _rotated(modes: list[str], turn: int) -> list[str]:
    first = turn % len(modes)
    return modes[first:] + modes[:first]


def _columns(modes: list[str], turns: dict[str, tuple]) -> tuple[dict, dict]:
    """Results and seconds, each by mode in the order of `modes`, whatever the order of the turns was."""
    return {mode: turns[mode][0] for mode in modes}, {mode: turns[mode][1] for mode in modes}


def _next_result(updates: Iterator[Update]) -> tuple[Result, float]:
    """The next prompt of a decoder that takes one at a time."""
    began = time.perf_counter()
    result = next(update.result for update in updates if update.result is not None)
    return result, time.perf_counter() - began


def _decode(decoder: Decoder) -> tuple[list[Result], float]:
    began = time.perf_counter()
    for _ in decoder:
        pass
    return decoder.results(), time.perf_counter() - began
