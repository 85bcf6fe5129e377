"""`simsd mask`: draws an attention mask in the terminal, or to a picture."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simsd.errors import SimsdError

if TYPE_CHECKING:
    from simsd_kernels import drawing
    from simsd_kernels.visibility import Visibility


class Kind(StrEnum):
    bidirectional = "bidirectional"
    causal = "causal"
    sliding_window = "sliding-window"
    block_causal = "block-causal"
    tree = "tree"
    temporal = "temporal"
    unrolled = "unrolled"


def mask(
    kind: Annotated[Kind, typer.Argument(help="Which mask.")] = Kind.temporal,
    length: Annotated[int, typer.Option(help="Tokens: bidirectional, causal, sliding-window, block-causal.")] = 12,
    block_length: Annotated[int, typer.Option(help="Tokens per block: block-causal, unrolled.")] = 4,
    window: Annotated[int, typer.Option(help="Tokens that a token sees: sliding-window.")] = 4,
    parents: Annotated[str, typer.Option(help="Parent of each node, -1 for a root: tree.")] = "-1,0,0,1,1,2",
    steps: Annotated[
        str,
        typer.Option(help="Step that revealed each position of the block, 0 known before, -1 never drafted: temporal."),
    ] = "2,1,3,4",
    copies: Annotated[int, typer.Option(help="Drafted states of the block: unrolled.")] = 3,
    prefix: Annotated[int, typer.Option(help="Committed tokens in the cache: temporal, unrolled.")] = 4,
    pending: Annotated[
        bool, typer.Option("--pending", help="A finished block goes first: temporal, unrolled.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write this .png, .svg or .pdf file instead of drawing in the terminal.")
    ] = None,
) -> None:
    """Draw an attention mask: a row per query, a column per key.

    temporal is SimSD's verify forward as published, unrolled the exact one.
    """
    from simsd_kernels import drawing  # brings torch: not for --help

    try:
        visibility, labels = _build(kind, length, block_length, window, parents, steps, copies, prefix, pending)
        if out is not None:
            drawing.save(visibility, out, labels, title=kind.value)
        shown = f"wrote {out}" if out is not None else drawing.terminal(visibility, labels)
    except OSError as error:
        raise SimsdError(f"cannot write {out}: {error.strerror}") from error
    except (ValueError, TypeError, ImportError) as error:
        raise SimsdError(str(error)) from error
    typer.echo(shown)


def _build(
    kind: Kind,
    length: int,
    block_length: int,
    window: int,
    parents: str,
    steps: str,
    copies: int,
    prefix: int,
    pending: bool,
) -> tuple[Visibility, drawing.Labels | None]:
    from simsd_kernels import drawing
    from simsd_kernels.visibility import Visibility

    match kind:
        case Kind.bidirectional:
            return Visibility.bidirectional(length), None
        case Kind.causal:
            return Visibility.causal(length), None
        case Kind.sliding_window:
            return Visibility.sliding_window(length, window), None
        case Kind.block_causal:
            return Visibility.block_causal(length, block_length), None
        case Kind.tree:
            return Visibility.tree(_integers("--parents", parents)), None
        case Kind.temporal:
            revealed = _integers("--steps", steps)
            visibility = Visibility.temporal(revealed, prefix, pending=pending)
            return visibility, drawing.temporal_labels(revealed, prefix, pending)
        case Kind.unrolled:
            visibility = Visibility.unrolled(copies, block_length, prefix, pending=pending)
            return visibility, drawing.unrolled_labels(copies, block_length, prefix, pending)


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise SimsdError(f"{option} must be integers with commas between, such as 2,1,3,4; got {text!r}") from None
