"""Options that commands share, and what becomes of them: a config and a pair of models."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simsd.cli import threads
from simsd.config import (
    DRAFTERS,
    MAX_LOOKAHEAD,
    MAX_TOP_LOGPROBS,
    REJECTED_TAILS,
    RULES,
    STRATEGIES,
    VERIFIERS,
    GenerationConfig,
)
from simsd.errors import SimsdError
from simsd.models.families import FAMILIES
from simsd.models.folders import BUILT_IN, LONG_PAIR, TINY_PAIR

if TYPE_CHECKING:
    from simsd.models.loading import LoadedModel

TARGET = TINY_PAIR[0]
DRAFT_OF = dict((TINY_PAIR, LONG_PAIR))
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZE = ("int8", "int4", "float8")
DEFAULTS = GenerationConfig()
LONG_LOAD_SECONDS = 3.0  # that loading may take and say nothing


def _option(name: str, help: str, panel: str, values=(), **more):
    """`values`: what a shell completes it with."""
    complete = (lambda: list(values)) if values else None
    return typer.Option(f"--{name}", help=help, rich_help_panel=panel, autocompletion=complete, **more)


def _choice(name: str, help: str, values, metavar: str | None = None):
    return _option(name, help, "Decoding", values, metavar=metavar or "[" + "|".join(values) + "]")


def _loop(name: str, help: str, **more):
    return _option(name, help, "Decoding", **more)


def _model(name: str, help: str, values=(), **more):
    return _option(name, help, "Models", values, **more)


def _draw(name: str, help: str, **more):
    return _option(name, help, "Sampling", **more)


Target = Annotated[str, _model("target", "Built-in name, checkpoint folder or hub id (see simsd models).", BUILT_IN)]
Draft = Annotated[
    str | None,
    _model(
        "draft",
        "The same for the draft, or none; if not given, the one that goes with a built-in target.",
        (*DRAFT_OF.values(), "none"),
    ),
]
Dtype = Annotated[str, _model("dtype", "auto (as stored), float32, bfloat16 or float16.", DTYPES)]
Device = Annotated[str, _model("device", "auto (cuda if there is one), cpu, cuda ...")]
Quantize = Annotated[
    str | None, _model("quantize", f"How the weights of both are stored: {', '.join(QUANTIZE)}.", QUANTIZE)
]
# What checkpoints say of themselves, those of fine-tunes not always.
Family = Annotated[
    str | None,
    _model(
        "family",
        "How the target is read, where its config.json is a plain qwen3, qwen2 or llama (see simsd models).",
        [family.name for family in FAMILIES],
    ),
]
BlockLength = Annotated[
    int | None, _model("block-length", "Tokens per block of both; as their files say if not given.")
]
MaskTokenId = Annotated[int | None, _model("mask-token-id", "Mask token of both; as their files say if not given.")]
Shift = Annotated[
    bool | None,
    _model(
        "shift/--no-shift", "The target's row predicts the next position, or its own; as its files say if not given."
    ),
]
DraftFamily = Annotated[
    str | None, _model("draft-family", "As --family, of the draft.", [family.name for family in FAMILIES])
]
DraftShift = Annotated[bool | None, _model("draft-shift/--no-draft-shift", "As --shift, of the draft.")]
Revision = Annotated[str | None, _model("revision", "Branch, tag or commit of the target, where it is a hub id.")]
DraftRevision = Annotated[str | None, _model("draft-revision", "As --revision, of the draft.")]
LocalFilesOnly = Annotated[bool | None, _model("local-files-only", "Take hub ids from the cache, without a network.")]

MaxNewTokens = Annotated[int, _loop("max-new-tokens", "Tokens to generate at most.")]
Verify = Annotated[
    str,
    _choice(
        "verify",
        "exact: native decoding's text in fewer forwards. temporal: SimSD as published, an approximation. "
        "none: native decoding.",
        VERIFIERS,
    ),
]
Drafter = Annotated[
    str, _choice("drafter", "Who drafts for exact; auto: whichever pays. The text is the same.", DRAFTERS)
]
Lookahead = Annotated[int, _loop("lookahead", f"Blocks that one exact verification may span, 1 to {MAX_LOOKAHEAD}.")]
MaxRows = Annotated[
    int | None, _loop("max-rows", "Rows of drafted states per exact verification; by timing if not given.")
]
OrderHead = Annotated[
    str,
    _loop(
        "order-head", "File of simsd train-order, or none; auto: order-L.safetensors beside the target, of blocks L."
    ),
]
Accept = Annotated[str, _choice("accept", "temporal: rule that accepts a drafted token.", RULES)]
RejectedTail = Annotated[
    str,
    _choice(
        "rejected-tail",
        f"temporal: what follows a rejected token: {', '.join(REJECTED_TAILS)}.",
        REJECTED_TAILS,
        "POLICY",
    ),
]
Strategy = Annotated[
    str, _choice("strategy", f"What a denoising step reveals: {', '.join(STRATEGIES)}.", STRATEGIES, "STRATEGY")
]
Steps = Annotated[int | None, _loop("steps", "Denoising steps per block; the block length if not given.")]
SubBlockLength = Annotated[
    int | None,
    _loop("sub-block-length", "Tokens of a block to fill at a time; the model's own if not given."),
]
DraftSteps = Annotated[
    int | None, _loop("draft-steps", "Forwards of the draft per block; 1 for exact, all for temporal.")
]
Threshold = Annotated[float, _loop("threshold", "Probability that low_confidence_dynamic asks for.")]
EntropyBound = Annotated[float, _loop("entropy-bound", "Nats that a step of entropy_bounded may spend.")]
EndGate = Annotated[
    float, _loop("end-gate", "temporal: least probability of an end token that comes as bonus; 0: any.")
]

Temperature = Annotated[float, _draw("temperature", "0 is greedy.")]
TopK = Annotated[int, _draw("top-k", "Ids to draw from; 0: all.")]
TopP = Annotated[float, _draw("top-p", "Probability mass to draw from; 1: all.")]
Seed = Annotated[int, _draw("seed", "Seed of the noise.")]
TopLogprobs = Annotated[
    int,
    _draw("top-logprobs", f"With --json: most probable ids to tell of each token, 0 to {MAX_TOP_LOGPROBS}."),
]


def config_from(values: dict[str, Any]) -> GenerationConfig:
    """The config of a command's arguments (its `locals()`); raises SimsdError for a bad value."""
    names = {field.name for field in dataclasses.fields(GenerationConfig)}
    return GenerationConfig(**{name: value for name, value in values.items() if name in names})


def draft_name(target: str, draft: str | None) -> str | None:
    """The draft to load: as given, the one that goes with a built-in target, or None."""
    if draft is None:
        return DRAFT_OF.get(target)
    return None if draft.lower() == "none" else draft


def load_models(
    target: str, draft: str | None, values: Mapping[str, Any], batch: int = 1
) -> tuple[LoadedModel, LoadedModel | None]:
    """Target and draft (None for none) by a command's arguments (its `locals()`), on the device that `auto` means here,
    and the threads for `batch` sequences at a time."""
    for option, value in (("target", target), ("draft", draft)):
        if value == "":
            raise SimsdError(f"--{option} is empty: give a built-in name ({', '.join(BUILT_IN)}), a folder or a hub id")

    import torch

    from simsd.engine.pair import load_pair

    device = values["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    models = load_pair(target, draft, {**values, "device": device})
    if models[0].tokenizer is None:
        raise SimsdError(f"target {target} has no tokenizer: put its tokenizer.json and tokenizer_config.json there")
    threads.choose(models[0], batch)
    _tell_of_long_loads(models)
    return models


def _tell_of_long_loads(models: list[LoadedModel | None]) -> None:
    """One line on standard error: GiB and seconds of each."""
    loaded = [model for model in models if model is not None]
    if sum(model.load_seconds for model in loaded) > LONG_LOAD_SECONDS:
        told = (f"{one.name}: {one.weight_bytes / 2**30:.2f} GiB in {one.load_seconds:.1f} s" for one in loaded)
        print(f"loaded {', '.join(told)}", file=sys.stderr)
