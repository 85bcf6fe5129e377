"""`simsd train-order`: an order head for a model, from prompts."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simsd.cli import many, streams
from simsd.cli import options as opt
from simsd.cli.prompts import read_prompts
from simsd.errors import SimsdError

if TYPE_CHECKING:
    from simsd.order.run import Report

INTERRUPTED = 130


def train_order(
    target: Annotated[
        str, typer.Argument(metavar="MODEL", help="Built-in name, checkpoint folder or hub id (see simsd models).")
    ],
    prompts: Annotated[
        Path,
        typer.Argument(
            help='One prompt per line, or JSON lines with "prompt" or "messages" (.jsonl). Better 1,000 than 100.'
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file of the head, a new one.")] = Path(
        "order.safetensors"
    ),
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    quantize: opt.Quantize = None,
    family: opt.Family = None,
    block_length: opt.BlockLength = None,
    mask_token_id: opt.MaskTokenId = None,
    shift: opt.Shift = None,
    revision: opt.Revision = None,
    local_files_only: opt.LocalFilesOnly = None,
    max_new_tokens: opt.MaxNewTokens = opt.DEFAULTS.max_new_tokens,
    batch: Annotated[int, typer.Option("--batch", help="Texts to record at a time, at most.")] = 16,
    steps: Annotated[int, typer.Option("--steps", help="Steps of training.")] = 6000,
    temperature: opt.Temperature = opt.DEFAULTS.temperature,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the noise and of training.")] = 0,
) -> int:
    """Learn the order in which a model reveals its blocks, for fewer forwards of exact decoding.

    The model answers the prompts natively, one token a step, and a small network is trained on what it saw: a tenth of
    the prompts is held out to choose and judge it by. Texts never depend on it.

    Ctrl-C keeps what is done; the same command goes on from there.
    """
    opt.config_from(locals() | {"max_batch": batch, "steps": None})
    if max_new_tokens < 1:
        raise SimsdError("max_new_tokens must be at least 1: nothing is revealed in 0 tokens")
    many.check_output(output)
    given = read_prompts(prompts)
    target_model, _ = opt.load_models(target, None, locals(), batch)

    from simsd.order.run import train_order_head, unfinished
    from simsd.prompts import encode_prompts

    tokens = encode_prompts(target_model, given)
    try:
        with _progress() as progress:
            report = train_order_head(
                target_model,
                tokens,
                output,
                steps=steps,
                max_new_tokens=max_new_tokens,
                max_batch=batch,
                temperature=temperature,
                seed=seed,
                progress=progress,
            )
    except KeyboardInterrupt:
        kept = unfinished(output)
        what = f"the same command goes on from {kept}" if kept.is_dir() else "before anything was kept"
        streams.errors().print(f"interrupted: {what}", soft_wrap=True, style="dim", markup=False)
        return INTERRUPTED
    _show(report)
    own = [] if block_length is None else ["--block-length", str(block_length)]
    print(shlex.join(["simsd", "generate", "--target", target, *own, "--order-head", str(output)]))
    return 0


def _show(report: Report) -> None:
    from rich import box
    from rich.table import Table

    console = streams.output()
    console.print(
        f"recorded {report.states} states of {report.blocks} blocks from {report.prompts} prompts in"
        f" {report.recording_seconds:.1f} s, trained in {report.training_seconds:.1f} s",
        soft_wrap=True,
    )
    table = Table(
        box=box.SIMPLE_HEAD, title="what is revealed next, told right, on prompts held out", title_justify="left"
    )
    for column in ("reveals since the state seen", "order head", "log-odds alone", "cases"):
        table.add_column(column, justify="right")
    for row in report.accuracies:
        table.add_row(str(row.staleness), f"{row.head:.1%}", f"{row.rule:.1%}", str(row.cases))
    console.print(table)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error for each stage, or a line where that is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = streams.errors()
    if not console.is_terminal:

        def tell(stage: str, done: int, total: int) -> None:
            if done == total:
                console.print(f"train-order: {stage} done, {total} {_UNITS[stage]}", soft_wrap=True)

        yield tell
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bars = {stage: progress.add_task(f"{stage} {unit}", total=None) for stage, unit in _UNITS.items()}
        yield lambda stage, done, total: progress.update(bars[stage], completed=done, total=total)


_UNITS = {"recording": "prompts", "training": "steps"}
