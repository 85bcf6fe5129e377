"""`simsd generate`: one prompt in, text out; or a file of prompts, and a JSON line for each text."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simsd.cli import many, streams
from simsd.cli import options as opt
from simsd.cli.prompts import Request, read_requests
from simsd.errors import SimsdError

if TYPE_CHECKING:
    from simsd.config import GenerationConfig
    from simsd.engine.decoder import Decoder
    from simsd.models.loading import LoadedModel
    from simsd.results import Result

INTERRUPTED = 130


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - or nothing reads it from standard input.")] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="System turn before each prompt; needs a chat template.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help='A file of prompts instead: one per line, or JSON lines with "prompt" or "messages" and, if you like, '
            '"id" (.jsonl). A JSON line for each text comes out.',
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="With --prompts: the file of the JSON lines, a new one.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Texts to decode at a time, at most.")] = 8,
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
    max_new_tokens: opt.MaxNewTokens = opt.DEFAULTS.max_new_tokens,
    verify: opt.Verify = opt.DEFAULTS.verify,
    drafter: opt.Drafter = opt.DEFAULTS.drafter,
    lookahead: opt.Lookahead = opt.DEFAULTS.lookahead,
    max_rows: opt.MaxRows = None,
    order_head: opt.OrderHead = opt.DEFAULTS.order_head,
    accept: opt.Accept = opt.DEFAULTS.accept,
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
    n: Annotated[
        int,
        typer.Option("-n", "--n", help="Texts per prompt, each with a seed of its own.", rich_help_panel="Sampling"),
    ] = 1,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="End the text before this string; may be given more than once."),
    ] = None,
    top_logprobs: opt.TopLogprobs = opt.DEFAULTS.top_logprobs,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per text.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print text as it comes, the unfinished block dim on a terminal.")
    ] = False,
    show_steps: Annotated[bool, typer.Option("--show-steps", help="Show how and when each token came.")] = False,
) -> int:
    """Generate text for a prompt.

    Text goes to standard output, statistics to standard error.

    Ctrl-C ends the generation and prints what is there.
    """
    config = opt.config_from(
        locals() | {"stop": [streams.text_argument(string, "a --stop string") for string in stop or ()]}
    )
    alone = stream or show_steps
    if as_json and alone:
        raise SimsdError("--json prints one object at the end: leave out --stream and --show-steps")
    if alone and (prompts is not None or n > 1):
        raise SimsdError("--stream and --show-steps show one text: leave out --prompts and -n")
    if config.top_logprobs and not as_json and prompts is None:
        raise SimsdError("--top-logprobs are told in JSON: add --json")
    if output is not None and prompts is None:
        raise SimsdError("--output goes with --prompts: the text of one prompt is standard output, as in > FILE")
    if prompts is not None and prompt is not None:
        raise SimsdError("--prompts replaces the prompt: give one of them")
    if output is not None:
        many.check_output(output)
    requests = [Request(_prompt(prompt))] if prompts is None else read_requests(prompts)
    system = None if system is None else streams.text_argument(system, "--system")
    chats = [request.with_system(system) for request in requests]
    unneeded = not config.asks_draft_model
    named = None if unneeded else opt.draft_name(target, draft)
    target_model, draft_model = opt.load_models(target, named, locals(), min(batch, n * len(requests)))
    if system is not None and target_model.tokenizer.backend.chat_template is None:
        raise SimsdError(f"--system needs a chat template, and the tokenizer of {target} has none")

    from simsd.engine.decoder import Decoder
    from simsd.prompts import encode_prompts

    tokens = encode_prompts(target_model, chats)
    decoder = Decoder(target_model, tokens, draft_model, config, max_batch=batch)
    if named is None and draft is None and not unneeded:
        instead = "it drafts for itself" if config.verify == "exact" else "native decoding"
        print(f"no --draft for {target}: {instead}", file=sys.stderr)
    _warm_up(target_model, draft_model, config, tokens[0])
    if prompts is not None:
        return INTERRUPTED if many.decode(decoder, requests, output) else 0
    interrupted = _decode(decoder, stream)
    _print(decoder, requests[0].prompt, as_json, stream, show_steps)
    for result in decoder.results():
        if result.finish_reason == "failed":
            raise SimsdError(f"{target}: {result.error}; try --dtype float32, or check its weights and its tokenizer")
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


def _warm_up(target: LoadedModel, draft: LoadedModel | None, config: GenerationConfig, prompt: list[int]) -> None:
    """Decodes a block and throws it away: what libraries do at their first call is not the model's speed."""
    from simsd.engine.decoder import Decoder
    from simsd.engine.pair import block_length

    length = block_length(target, draft, config)
    short = dataclasses.replace(config, max_new_tokens=min(config.max_new_tokens, length), n=1, stop=())
    for _ in Decoder(target, [prompt[:length]], draft, short):
        pass


def _decode(decoder: Decoder, stream: bool) -> bool:
    """Runs the decoder, printing text as it comes where asked; returns whether Ctrl-C ended it."""
    from simsd.cli.text import StreamedText, before_end

    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    text = StreamedText(decoder.target.tokenizer, sys.stdout, terminal) if stream else None
    try:
        for update in decoder:
            if text is not None:
                text.push(update.text, before_end(update.provisional, decoder.end_ids))
    except KeyboardInterrupt:
        return True
    finally:
        # An interrupt may have come between a commit and its printing: what is committed is shown.
        if text is not None:
            text.end(decoder.result().text)
    return False


def _print(decoder: Decoder, prompt: str, as_json: bool, stream: bool, show_steps: bool) -> None:
    from simsd.cli.steps import statistics, steps_view

    results = decoder.results()
    if as_json:
        for result in results:
            print(streams.json_line({"prompt": prompt} | result.to_dict(), sys.stdout), flush=True)
        return
    if show_steps:
        console = streams.output()
        view = steps_view(
            results[0], decoder.target.tokenizer, console.width, decoder.block_length, decoder.config.verify
        )
        for line in view:
            console.print(line, soft_wrap=True)
    elif not stream:
        print("\n".join(_titled(results)), flush=True)
    console = streams.errors()
    for result in results:
        console.print(statistics(result), soft_wrap=True, style="dim", markup=False)


def _titled(results: list[Result]) -> list[str]:
    """Texts; with a line before each where there are several."""
    if len(results) == 1:
        return [results[0].text]
    count = len(results)
    return [f"--- {i} of {count}, seed {result.seed}\n{result.text}" for i, result in enumerate(results, start=1)]
