"""`simsd audit`: whether speculative decoding leaves the text of a model as it is, checked on that model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simsd.cli import options as opt
from simsd.cli import streams
from simsd.config import STRATEGIES
from simsd.errors import SimsdError

if TYPE_CHECKING:
    from rich.console import Console

    from simsd.audit import Check, Report, Stage

FAILED, INTERRUPTED = 1, 130
WIDTH = 120  # of the table where standard output is no terminal
DIFFERENCES = 10  # shown in the terminal; --json and --markdown hold them all
COLOURS = {"PASS": "green", "FAIL": "bold red", "REPORT": "cyan", "INCONCLUSIVE": "yellow"}
QUICK = {"items": 1, "seeds": 600, "max_new_tokens": 16, "strategies": "sequential,low_confidence_static"}


def audit(
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
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help='Your prompts: one per line, or JSON lines with "prompt" or "messages" (.jsonl).'
        ),
    ] = None,
    items: Annotated[
        int | None,
        typer.Option("--items", help="Built-in tasks per family; 5 if not given."),
    ] = None,
    verify: Annotated[
        str,
        typer.Option(
            "--verify", help="exact: required to pass. temporal: figures only.", metavar="[exact|temporal|both]"
        ),
    ] = "both",
    strategies: Annotated[
        str | None,
        typer.Option("--strategies", help="For equality, with commas between; all four if not given.", metavar="NAMES"),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Of the sampled equality runs, beside greedy ones; 0: greedy only.")
    ] = 1.0,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Tokens per prompt at most; 32 if not given.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Prompts at a time, beside one at a time.")] = 8,
    seeds: Annotated[
        int | None, typer.Option("--seeds", help="Texts drawn per distribution test; 3000 if not given.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="One task per family, 16 tokens, 600 seeds, two strategies."),
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the table to this file.")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw shifts of logits and differing texts: .png, .svg or .pdf.")
    ] = None,
) -> int:
    """Check on your own model that speculative decoding leaves its text as it is.

    Equality: texts token by token. Leak: whether a verdict depends on the token it judges.

    Context: verified states against forwards of their own. Distribution: what is drawn, at temperature 1.

    Exit code 1 where a required check fails.
    """
    if prompts is not None and items is not None:
        raise SimsdError("--prompts replaces the built-in tasks: leave out --items")
    for file in (json_file, markdown_file, plot_file):
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise SimsdError(f"{file} cannot be written: it is a folder, or its folder does not exist")
    if plot_file is not None:
        from simsd.audit import plot

        plot.check_file(plot_file)
    given = {"items": items, "seeds": seeds, "max_new_tokens": max_new_tokens, "strategies": strategies}
    chosen = (QUICK if quick else {}) | {name: value for name, value in given.items() if value is not None}
    settings, count = _settings(chosen, verify, temperature, batch)
    own = None
    if prompts is not None:
        from simsd.cli.prompts import read_prompts

        own = read_prompts(prompts)  # before the models are loaded

    from simsd import audit as auditing

    own = auditing.default_prompts(count) if own is None else own
    target_model, draft_model = opt.load_models(target, opt.draft_name(target, draft), locals(), batch)
    stages = auditing.stages(target_model, draft_model, own, settings)
    checks: list[Check] = []
    complete = True
    try:
        for found in _with_progress(stages):
            checks += found
    except KeyboardInterrupt:
        complete = False
    report = auditing.finish(checks, target_model, draft_model, own, settings, complete)
    if markdown_file is not None:
        markdown_file.write_text(report.markdown(), encoding="utf-8")
    if json_file is not None:
        json_file.write_text(json.dumps(_finite(report.to_dict()), indent=2) + "\n", encoding="utf-8")
    if plot_file is not None:
        plot.save(report, plot_file)
    if checks:
        _show(report, streams.output(WIDTH))  # last: its reader may leave
    if not complete:
        return INTERRUPTED
    return 0 if report.passed else FAILED


def _settings(chosen: dict, verify: str, temperature: float, batch: int):
    """The audit's settings and the built-in tasks per family."""
    from simsd.audit import ITEMS, Settings

    chosen = dict(chosen)
    count = chosen.pop("items", ITEMS)
    if count < 1:
        raise SimsdError(f"--items must be at least 1 per family, got {count}")
    names = [name.strip() for name in chosen.pop("strategies", ",".join(STRATEGIES)).split(",")]
    strategies = tuple(name for name in names if name)
    return Settings(verify=verify, strategies=strategies, temperature=temperature, batch=batch, **chosen), count


def _with_progress(stages: list[Stage]) -> Iterator[list[Check]]:
    """Runs the stages; a bar on standard error, or a line per part where that is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = streams.errors()
    if not console.is_terminal:
        for done, stage in enumerate(stages, start=1):
            yield stage.run()
            part = stage.name.partition(",")[0]
            if done == len(stages) or stages[done].name.partition(",")[0] != part:
                console.print(f"audit: {part} done, {done} of {len(stages)} stages", soft_wrap=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(stages))
        for done, stage in enumerate(stages):
            progress.update(bar, completed=done, description=stage.name)
            yield stage.run()


def _show(report: Report, console: Console) -> None:
    from rich import box
    from rich.table import Table

    from simsd.audit import describe

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("part", "check", "verify", "result", "figures"):
        table.add_column(name, no_wrap=name in ("part", "verify", "result"), overflow="fold")
    part = None
    for check in report.checks:
        if part not in (None, check.part):
            table.add_section()
        name, part = "" if check.part == part else check.part, check.part
        result = f"[{COLOURS[check.result]}]{check.result}[/]"
        table.add_row(name, check.name, check.verify, result, check.summary)
    console.print(table)
    found = report.differences()
    for check, difference in found[:DIFFERENCES]:
        console.print(f"{check.name}: {describe(difference)}", markup=False)
    if len(found) > DIFFERENCES:
        console.print(f"... and {len(found) - DIFFERENCES} more", markup=False)
    for line in report.caption():
        console.print(line, style="dim", markup=False)
    console.print(report.upshot(), markup=False)
    if not report.complete:
        console.print("interrupted: the checks that were left are missing", style="bold yellow", markup=False)


def _finite(value):
    """JSON has no infinity and no NaN: they become text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value
