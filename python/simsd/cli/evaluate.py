"""`simsd evaluate`: accuracy and speed on one's own questions, native decoding beside its accelerations."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simsd.cli import options as opt
from simsd.cli import streams
from simsd.cli.bench import batch_sizes, check_writable, names, with_progress
from simsd.cli.questions import Question, read_questions
from simsd.errors import SimsdError
from simsd.evaluate import matchers, plot
from simsd.evaluate.positions import spans

if TYPE_CHECKING:
    from simsd.benchmarking import BatchMeasurement, Measurement
    from simsd.models.loading import LoadedModel

INTERRUPTED = 130


def evaluate(
    file: Annotated[
        Path,
        typer.Argument(help='JSON lines: {"question": ..., "answer": ...}; or a list of answers.', metavar="FILE"),
    ],
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
    match: Annotated[
        str,
        typer.Option(
            "--match",
            help="What makes a text right. exact: it is the answer. contains: it has the answer's words. number: its "
            "last number is. choice: the letter that it chooses is. regex: the last match of --pattern is.",
            metavar="[" + "|".join(matchers.NAMES) + "]",
            autocompletion=lambda: list(matchers.NAMES),
        ),
    ] = "contains",
    pattern: Annotated[
        str | None, typer.Option("--pattern", help="A regular expression, with one group or none, for --match regex.")
    ] = None,
    question_key: Annotated[str, typer.Option("--question-key", help="Key of the question.")] = "question",
    answer_key: Annotated[str, typer.Option("--answer-key", help="Key of the answer.")] = "answer",
    group_key: Annotated[
        str | None, typer.Option("--group-key", help="Key by which to show questions in groups.")
    ] = None,
    modes: Annotated[
        str,
        typer.Option(
            "--modes", help="Some of native, temporal, temporal-mrs, exact-model, exact-self, exact-auto; native is in."
        ),
    ] = "native,exact-auto",
    batch: Annotated[
        str, typer.Option("--batch", help="Questions to decode at a time, several sizes as in 1,8. 1 is always in.")
    ] = "1",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write figures and texts to this file.")] = None,
    plot_folder: Annotated[
        Path | None,
        typer.Option("--plot", help="Write pictures to this folder: speed against quality, tokens per forward."),
    ] = None,
    max_new_tokens: opt.MaxNewTokens = opt.DEFAULTS.max_new_tokens,
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
    """Answer a file of questions: right answers and speed, native decoding beside speculative.

    The modes take turns question by question in one run, as in simsd bench. A question is a user's turn through the
    model's chat template, or a chat of its own.

    Ctrl-C ends the run and shows what was measured until then.
    """
    config = opt.config_from(locals() | {"verify": "temporal"})  # which has a use for every setting
    if config.max_new_tokens < 1:
        raise SimsdError("max_new_tokens must be at least 1: no question is answered in 0 tokens")
    check_writable(json_file)
    if plot_folder is not None:
        plot.check_folder(plot_folder)
    is_right = matchers.matcher(match, pattern)
    draft, batches = opt.draft_name(target, draft), batch_sizes(batch)
    questions = read_questions(file, match, question_key, answer_key, group_key)

    from simsd.benchmarking import Item, Measurement, choose_modes, compare
    from simsd.cli import tables
    from simsd.figures import summarise

    chosen_modes = choose_modes(names(modes), draft is not None)
    target_model, draft_model = opt.load_models(target, draft, locals(), max(batches))
    _check_prompts(file, questions, target_model)
    items = [
        Item(question.group, question.prompt, functools.partial(_is_right, is_right, question.answers))
        for question in questions
    ]
    question_of = {id(item): question for item, question in zip(items, questions, strict=True)}
    measured: list[Measurement | BatchMeasurement] = []
    interrupted = False
    try:
        comparison = compare(target_model, draft_model, items, config, chosen_modes, batches)
        for measurement in with_progress(comparison, items, batches, "evaluate"):
            measured.append(measurement)
    except KeyboardInterrupt:
        interrupted = True
    single = [measurement for measurement in measured if isinstance(measurement, Measurement)]
    if not single:
        return INTERRUPTED
    for measurement in single:
        for result in measurement.results.values():
            if result.finish_reason == "failed":
                raise SimsdError(f"{target}: {result.error}; try --dtype float32, or check its weights")
    report = summarise(measured, target_model, draft_model, config)
    positions = {
        mode: spans([m.results[mode] for m in single], report.settings["block_length"])
        for mode in chosen_modes
        if not mode.startswith("temporal")  # whose origins do not tell forwards apart
    }
    if json_file is not None:
        figures = {
            "file": str(file),
            "match": match,
            "pattern": pattern,
            "interrupted": interrupted,
            **report.to_dict(),
            "positions": {mode: [dataclasses.asdict(span) for span in found] for mode, found in positions.items()},
            "questions": [_answers(question_of[id(m.item)], m) for m in single],
        }
        json_file.write_text(json.dumps(figures, indent=2, default=list) + "\n", encoding="utf-8")
    if plot_folder is not None:
        plot.save(plot_folder, f"{report.target}, {file.name}", report.pooled, positions)
    notes = [f"interrupted after {len(single)} of {len(items)} questions"] if interrupted else []
    notes += _cut(single, config.max_new_tokens)
    tables.show(report, streams.output(), "; ".join(notes) or None)  # last: its reader may leave
    return INTERRUPTED if interrupted else 0


def _check_prompts(file: Path, questions: Sequence[Question], target: LoadedModel) -> None:
    """Raises SimsdError where the target cannot take a question, with its line."""
    for question in questions:
        try:
            target.encode_prompt(question.prompt)
        except SimsdError as error:
            raise SimsdError(f"{file}, line {question.line}: {error}") from None


def _is_right(matches: matchers.Matcher, answers: Sequence[str], text: str) -> bool:
    return any(matches(text, answer) for answer in answers)


def _answers(question: Question, measurement: Measurement) -> dict[str, Any]:
    """What became of a question in each mode."""
    modes = {
        mode: {
            "text": result.text,
            "right": measurement.item.grade(result.text or ""),
            "finish_reason": result.finish_reason,
            "tokens": len(result.tokens),
            "target_forwards": result.stats.target_forwards,
            "seconds": measurement.seconds[mode],
        }
        for mode, result in measurement.results.items()
    }
    return {"line": question.line, "question": question.prompt, "answers": question.answers, "modes": modes}


def _cut(measurements: Sequence[Measurement], max_new_tokens: int) -> list[str]:
    """A note where texts ended before they were done: their answers may be wrong for that alone."""
    cut = sum(m.results["native"].finish_reason == "length" for m in measurements)
    return [f"{cut} of {len(measurements)} native texts were cut at --max-new-tokens {max_new_tokens}"] if cut else []
