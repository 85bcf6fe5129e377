"""`simsd bench`: speed, acceptance and quality of every mode beside native decoding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simsd.cli import options as opt
from simsd.cli import streams
from simsd.cli.prompts import read_prompts
from simsd.errors import SimsdError

if TYPE_CHECKING:
    from simsd.benchmarking import BatchMeasurement, Item, Measurement

INTERRUPTED = 130


def bench(
    target: opt.Target = opt.TARGET,
    draft: opt.Draft = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    quantize: opt.Quantize = None,
    family: opt.Family = None,
    block_length: opt.BlockLength = None,
    mask_token_id: opt.MaskTokenId = None,
    shift: opt.Shift = None,
    draft_family: opt.DraftFamily = None,
    draft_shift: opt.DraftShift = None,
    revision: opt.Revision = None,
    draft_revision: opt.DraftRevision = None,
    local_files_only: opt.LocalFilesOnly = None,
    items: Annotated[
        int, typer.Option("--items", help="Held-out items per family: questions, of long-target questionnaires.")
    ] = 50,
    families: Annotated[
        str | None, typer.Option("--families", help="Some of arithmetic,code,facts,choice; all if not given.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help='Your own prompts instead: one per line, or JSON lines with "prompt" or "messages" (.jsonl).',
        ),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            "--modes",
            help="Some of native, temporal, temporal-mrs, exact-model, exact-self, exact-auto; all if not given. "
            "native is always in.",
        ),
    ] = None,
    batch: Annotated[
        str, typer.Option("--batch", help="Prompts to decode at a time, several sizes as in 1,8. 1 is always in.")
    ] = "1",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the tables to this file.")] = None,
    max_new_tokens: opt.MaxNewTokens = 128,
    lookahead: opt.Lookahead = opt.DEFAULTS.lookahead,
    max_rows: opt.MaxRows = opt.DEFAULTS.max_rows,
    order_head: opt.OrderHead = opt.DEFAULTS.order_head,
    rejected_tail: opt.RejectedTail = opt.DEFAULTS.rejected_tail,
    strategy: opt.Strategy = opt.DEFAULTS.strategy,
    steps: opt.Steps = None,
    sub_block_length: opt.SubBlockLength = None,
    draft_steps: opt.DraftSteps = None,
    threshold: opt.Threshold = opt.DEFAULTS.threshold,
    entropy_bound: opt.EntropyBound = opt.DEFAULTS.entropy_bound,
    end_gate: opt.EndGate = opt.DEFAULTS.end_gate,
    temperature: opt.Temperature = opt.DEFAULTS.temperature,
    top_k: opt.TopK = opt.DEFAULTS.top_k,
    top_p: opt.TopP = opt.DEFAULTS.top_p,
    seed: opt.Seed = 0,
) -> int:
    """Measure native decoding and what makes it faster: same target, same prompts.

    The modes take turns prompt by prompt in one run. exact-*: native decoding's text in fewer forwards, drafted by the
    draft model, by the target itself, or by whichever pays. temporal: SimSD as published, with the rules match and mrs.

    Ctrl-C ends the run and shows what was measured until then.
    """
    config = opt.config_from(locals() | {"verify": "temporal"})  # which has a use for every setting
    if config.max_new_tokens < 1:
        raise SimsdError("max_new_tokens must be at least 1: there is nothing to measure in 0 tokens")
    for file in (json_file, markdown_file):
        check_writable(file)
    draft = opt.draft_name(target, draft)
    if prompts is not None and families is not None:
        raise SimsdError("--prompts replaces the task families: leave out --families")
    batches = batch_sizes(batch)
    own = None if prompts is None else read_prompts(prompts)  # before the models are loaded

    from simsd.benchmarking import Item, Measurement, choose_modes, compare, task_items
    from simsd.cli import tables
    from simsd.figures import summarise

    chosen_modes = choose_modes(names(modes), draft is not None)
    if own is None:
        chosen = task_items(names(families) or _families(), items, target=target)
    else:
        chosen = [Item("prompts", prompt) for prompt in own]
    target_model, draft_model = opt.load_models(target, draft, locals(), max(batches))

    measured: list[Measurement | BatchMeasurement] = []
    interrupted = False
    try:
        comparison = compare(target_model, draft_model, chosen, config, chosen_modes, batches)
        for measurement in with_progress(comparison, chosen, batches):
            measured.append(measurement)
    except KeyboardInterrupt:
        interrupted = True
    if not measured:
        return INTERRUPTED
    report = summarise(measured, target_model, draft_model, config)
    done = sum(isinstance(measurement, Measurement) for measurement in measured)
    note = f"interrupted after {done} of {len(chosen)} items" if interrupted else None
    if markdown_file is not None:
        markdown_file.write_text(tables.markdown(report, note), encoding="utf-8")
    if json_file is not None:
        figures = {"interrupted": interrupted} | report.to_dict()
        json_file.write_text(json.dumps(figures, indent=2, default=list) + "\n", encoding="utf-8")
    tables.show(report, streams.output(), note)  # last: its reader may leave
    return INTERRUPTED if interrupted else 0


def check_writable(file: Path | None) -> None:
    """Raises SimsdError where a file cannot be written."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise SimsdError(f"{file} cannot be written: it is a folder, or its folder does not exist")


def names(value: str | None) -> list[str] | None:
    """What stands between commas."""
    return None if value is None else [name.strip() for name in value.split(",")]


def batch_sizes(value: str) -> list[int]:
    """Ascending, 1 always in."""
    sizes = names(value)
    if not all(size.isascii() and size.isdigit() and int(size) for size in sizes):
        raise SimsdError(f"--batch takes numbers >= 1 with commas in between, as in 1,8; got {value!r}")
    return sorted({1, *map(int, sizes)})


def _families() -> list[str]:
    from simsd.tasks import FAMILIES

    return list(FAMILIES)


def with_progress(
    measurements: Iterator[Measurement | BatchMeasurement],
    items: list[Item],
    batches: list[int],
    command: str = "bench",
) -> Iterator[Measurement | BatchMeasurement]:
    """Passes measurements on; a bar on standard error, or a line per family where that is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from simsd.benchmarking import ROUNDS, Measurement

    console = streams.errors()
    turns = 1 + ROUNDS * (len(batches) - 1)  # decodings of an item in each mode
    left = {item.family: 0 for item in items}
    for item in items:
        left[item.family] += turns

    def count(measurement: Measurement | BatchMeasurement) -> tuple[str, int]:
        """Its family, and how many turns it stands for."""
        part = [measurement.item] if isinstance(measurement, Measurement) else measurement.items
        left[part[0].family] -= len(part)
        return part[0].family, len(part)

    if not console.is_terminal:
        done = 0
        for measurement in measurements:
            yield measurement
            done += isinstance(measurement, Measurement)
            family, _ = count(measurement)
            if not left[family]:
                console.print(f"{command}: {family} done, {done} of {len(items)} items", soft_wrap=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("warming up", total=turns * len(items))
        for measurement in measurements:
            _, turn = count(measurement)
            progress.update(bar, advance=turn, description=next((name for name, n in left.items() if n), "done"))
            yield measurement
