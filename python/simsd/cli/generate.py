"""`simsd generate`: one prompt in, text out."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from simsd.cli import options as opt
from simsd.cli import streams
from simsd.errors import SimsdError

if TYPE_CHECKING:
    from simsd.decoding import Decoder

INTERRUPTED = 130


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - or nothing reads it from standard input.")] = None,
    target: opt.Target = opt.TARGET,
    draft: opt.Draft = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    max_new_tokens: opt.MaxNewTokens = opt.DEFAULTS.max_new_tokens,
    verify: opt.Verify = opt.DEFAULTS.verify,
    drafter: opt.Drafter = opt.DEFAULTS.drafter,
    lookahead: opt.Lookahead = opt.DEFAULTS.lookahead,
    max_rows: opt.MaxRows = None,
    accept: opt.Accept = opt.DEFAULTS.accept,
    rejected_tail: opt.RejectedTail = opt.DEFAULTS.rejected_tail,
    strategy: opt.Strategy = opt.DEFAULTS.strategy,
    steps: opt.Steps = None,
    block_length: opt.BlockLength = None,
    draft_steps: opt.DraftSteps = None,
    threshold: opt.Threshold = opt.DEFAULTS.threshold,
    entropy_bound: opt.EntropyBound = opt.DEFAULTS.entropy_bound,
    end_gate: opt.EndGate = opt.DEFAULTS.end_gate,
    temperature: opt.Temperature = opt.DEFAULTS.temperature,
    top_k: opt.TopK = opt.DEFAULTS.top_k,
    top_p: opt.TopP = opt.DEFAULTS.top_p,
    seed: opt.Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print text as it comes, the unfinished block dim on a terminal.")
    ] = False,
    show_steps: Annotated[bool, typer.Option("--show-steps", help="Show how and when each token came.")] = False,
) -> int:
    """Generate text for a prompt.

    Text goes to standard output, statistics to standard error.

    Ctrl-C ends the generation and prints what is there.
    """
    config = opt.config_from(locals())
    if as_json and (stream or show_steps):
        raise SimsdError("--json prints one object at the end: leave out --stream and --show-steps")
    prompt = _prompt(prompt)
    unneeded = config.verify == "none" or (config.verify == "exact" and config.drafter == "self")
    named = None if unneeded else opt.draft_name(target, draft)
    target_model, draft_model = opt.load_models(target, named, dtype, device)

    from simsd.decoding import Decoder

    decoder = Decoder(target_model, [target_model.encode_prompt(prompt)], draft_model, config)
    if named is None and draft is None and not unneeded:
        instead = "it drafts for itself" if config.verify == "exact" else "native decoding"
        print(f"no --draft for {target}: {instead}", file=sys.stderr)
    interrupted = _decode(decoder, stream)
    _print(decoder, prompt, as_json, stream, show_steps)
    if decoder.result().finish_reason == "failed":
        raise SimsdError(f"the logits of {target} are not finite numbers: try --dtype float32, or check its weights")
    return INTERRUPTED if interrupted else 0


def _prompt(given: str | None) -> str:
    if given is None and sys.stdin.isatty():
        raise SimsdError('no prompt: give one, as in simsd generate "What is the capital of France?", or pipe one in')
    text = given
    if given is None or given == "-":
        try:
            text = sys.stdin.read().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise SimsdError(f"standard input is not {error.encoding} text: {error.reason}") from error
        if given is None and not text:
            raise SimsdError('no prompt: standard input is empty (simsd generate "" generates from nothing)')
    return streams.text_argument(text, "the prompt")


def _decode(decoder: Decoder, stream: bool) -> bool:
    """Runs the decoder, printing text as it comes where asked; returns whether Ctrl-C ended it."""
    from simsd.cli.text import StreamedText

    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    text = StreamedText(decoder.target.tokenizer, sys.stdout, terminal) if stream else None
    try:
        for update in decoder:
            if text is not None:
                text.push(update.tokens, _before_end(update.provisional, decoder.end_ids))
    except KeyboardInterrupt:
        return True
    finally:
        # An interrupt may have come between a commit and its printing: what is committed is shown.
        if text is not None:
            text.end(decoder.result().tokens)
    return False


def _before_end(block: list[int | None], end_ids: tuple[int, ...]) -> list[int | None]:
    """The block as far as there is text: to its first end token."""
    return block[: next((i for i, token in enumerate(block) if token in end_ids), len(block))]


def _print(decoder: Decoder, prompt: str, as_json: bool, stream: bool, show_steps: bool) -> None:
    from simsd.cli.steps import statistics, steps_view

    result = decoder.result()
    if as_json:
        print(streams.json_line({"prompt": prompt} | result.to_dict()))
        return
    if show_steps:
        console = streams.output()
        for line in steps_view(result, decoder.target.tokenizer, console.width, decoder.config.verify):
            console.print(line, soft_wrap=True)
        console.print(statistics(result), soft_wrap=True, style="dim", markup=False)
        return
    if not stream:
        print(result.text, flush=True)
    streams.errors().print(statistics(result), soft_wrap=True, style="dim", markup=False)
