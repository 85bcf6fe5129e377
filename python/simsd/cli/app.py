"""The commands, and how errors and interrupts end them."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from simsd.cli import streams, threads
from simsd.cli.audit import audit
from simsd.cli.batch import batch
from simsd.cli.bench import bench
from simsd.cli.chat import chat
from simsd.cli.evaluate import evaluate
from simsd.cli.generate import generate
from simsd.cli.info import info
from simsd.cli.mask import mask
from simsd.cli.models import models
from simsd.cli.serve import serve
from simsd.cli.train_order import train_order
from simsd.errors import SimsdError

USER_ERRORS = (ValueError, TypeError, RuntimeError, OSError, NotImplementedError, ImportError)
INTERRUPTED = 130
READER_LEFT = 141  # what a shell shows for a program that SIGPIPE ended

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(chat)
app.command()(bench)
app.command()(evaluate)
app.command()(audit)
app.command()(models)
app.command()(info)
app.command()(mask)
app.command()(serve)
app.command()(batch)
app.command()(train_order)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"simsd {version('simsd-kernels')}")
        except PackageNotFoundError:
            typer.echo("simsd (not installed: run from a checkout)")
        raise typer.Exit


def _ask_for_traceback(wanted: bool) -> None:
    if wanted:
        os.environ["SIMSD_DEBUG"] = "1"


@app.callback(epilog="SIMSD_DEBUG=1 is --debug; SIMSD_BACKEND chooses kernels; SIMSD_LOG=dispatch logs them.")
def simsd(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", callback=_ask_for_traceback, is_eager=True, help="Show tracebacks of errors.")
    ] = False,
) -> None:
    """Speculative decoding for block-diffusion language models (SimSD)."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 an audit's required check failed, 2 wrong input, 130 interrupted, 141
    the reader of its output left (as in `simsd ... | head -1`)."""
    threads.start()
    streams.prepare()
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as ended:
        # rich and typer answer a broken pipe with an exit of 1, which here means that an audit failed.
        if not isinstance(ended, BrokenPipeError) and not isinstance(ended.__context__, BrokenPipeError):
            raise
        code = READER_LEFT
        streams.drop_unwritable()
    sys.exit(code)


def _run(arguments: list[str] | None) -> int:
    try:
        code = app(args=arguments, prog_name="simsd", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except typer.Abort:
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: a wrong option, a missing argument
            if type(error).__name__ == "NoArgsIsHelpError":  # help is printed already
                return 2
            return _report(_usage_message(error))
        if not isinstance(error, USER_ERRORS):
            raise
        if os.environ.get("SIMSD_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
            return 2
        hint = "" if isinstance(error, SimsdError) else " (--debug shows where: simsd --debug ...)"
        return _report(f"{_one_line(error)}{hint}")


def _report(message: str) -> int:
    sys.stdout.flush()
    print(f"simsd: error: {message}", file=sys.stderr)
    return 2


def _usage_message(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "simsd"
    message = " ".join(error.format_message().split())
    return f"{message.rstrip('.')}; see {command} --help"


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return message or type(error).__name__
