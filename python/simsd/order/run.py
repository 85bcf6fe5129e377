"""From a model and prompts to an order head in a file, in two stages that an interrupt does not lose: traces are
recorded, the head is trained on them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from simsd.config import integer
from simsd.errors import SimsdError
from simsd.models.loading import LoadedModel
from simsd.order.head import facts_of, save_order_head
from simsd.order.traces import Traces, record_traces
from simsd.order.training import Accuracy, accuracies, split, train

RECORDING, TRAINING = "recording", "training"


@dataclasses.dataclass(frozen=True)
class Report:
    """What was recorded and learned: prompts without repetitions, their blocks and states, seconds of both stages (of
    this call alone, where an earlier one had begun), and accuracies on prompts held out."""

    prompts: int
    blocks: int
    states: int
    recording_seconds: float
    training_seconds: float
    accuracies: list[Accuracy]


def train_order_head(
    target: LoadedModel,
    prompts: Sequence[list[int]],
    file: Path,
    *,
    steps: int,
    max_new_tokens: int = 256,
    max_batch: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Report:
    """Trains an order head for `target` and writes it to `file`. What is done so far is kept in the folder
    `unfinished(file)` until then; the same call goes on from there.

    Args:
        prompts: token ids; of equal ones one counts.
        steps: of training, `simsd.order.training.BATCH` states each.
        max_new_tokens, temperature, seed: of the texts; the seed is that of training, too.
        max_batch: texts to record at a time; they do not depend on it.
        progress: called with "recording" or "training", what is done of it and what there is to do.

    Raises:
        SimsdError: fewer than two prompts, blocks of one token, a bad setting, a sequence over the position limit, or
            unfinished work of other settings.
    """
    integer("steps", steps, 1)
    if target.block_length < 2:
        raise SimsdError(f"{target.name} decodes blocks of {target.block_length} token: there is no order to learn")
    prompts = [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]
    if len(prompts) < 2:
        raise SimsdError(
            f"an order head is trained on some prompts and judged by others: give two or more, got {len(prompts)}"
        )
    settings = {
        "model": {"name": target.name} | facts_of(target),
        "block_length": target.block_length,
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "steps": steps,
    }
    folder = unfinished(file)
    began = time.perf_counter()
    kept = folder / "traces.safetensors"
    if kept.exists():
        traces, before = Traces.load(kept)
        _check_same(folder, before, settings)
        progress(RECORDING, len(prompts), len(prompts))
    else:
        done = itertools.count(1)
        traces = record_traces(
            target,
            prompts,
            max_new_tokens=max_new_tokens,
            max_batch=max_batch,
            temperature=temperature,
            seed=seed,
            advance=lambda: progress(RECORDING, next(done), len(prompts)),
        )
        folder.mkdir(exist_ok=True)
        partial = folder / "traces.partial"
        traces.save(partial, settings)
        partial.replace(kept)
    recorded = time.perf_counter()
    trained_on, held_out = split(traces, seed)
    head = train(
        trained_on,
        held_out,
        steps=steps,
        seed=seed,
        checkpoint=folder / "training.pt",
        advance=lambda step: progress(TRAINING, step, steps),
    )
    report = Report(
        prompts=len(prompts),
        blocks=len(traces),
        states=traces.states,
        recording_seconds=recorded - began,
        training_seconds=time.perf_counter() - recorded,
        accuracies=accuracies(head, held_out),
    )
    told = {name: settings[name] for name in ("max_new_tokens", "temperature", "seed", "steps")}
    told |= {"prompts": report.prompts, "states": report.states}
    save_order_head(head, file, target, told | {"held_out": [one._asdict() for one in report.accuracies]})
    shutil.rmtree(folder)
    return report


def unfinished(file: Path) -> Path:
    """The folder of what is done of a head that is not finished."""
    return file.with_name(file.name + ".unfinished")


def _check_same(folder: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if before.get(name) != value:
            what = f"{name} {before.get(name)}, not {value}"
            what = {"prompts": "other prompts", "model": "another model"}.get(name, what)
            raise SimsdError(f"{folder} holds the work of a run with {what}: repeat that one, or remove the folder")
