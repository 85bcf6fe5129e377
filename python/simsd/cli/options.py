"""Options that `generate` and `bench` share, and what becomes of them: a config and a pair of models."""

from __future__ import annotations

import dataclasses
import sys
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

if TYPE_CHECKING:
    from simsd.models.loading import LoadedModel

TARGET, DRAFT = "tiny-target", "tiny-draft"
DTYPES = ("auto", "float32", "bfloat16", "float16")
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


def _draw(name: str, help: str, **more):
    return _option(name, help, "Sampling", **more)


Target = Annotated[
    str, _option("target", "Built-in name, checkpoint folder or hub id (see simsd models).", "Models", (TARGET, DRAFT))
]
Draft = Annotated[
    str | None,
    _option(
        "draft",
        f"The same for the draft, or none; {DRAFT} goes with {TARGET}, else none.",
        "Models",
        (DRAFT, "none"),
    ),
]
Dtype = Annotated[str, _option("dtype", "auto (as stored), float32, bfloat16 or float16.", "Models", DTYPES)]
Device = Annotated[str, _option("device", "auto (cuda if there is one), cpu, cuda ...", "Models")]

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
BlockLength = Annotated[int | None, _loop("block-length", "Tokens per block; the target's if not given.")]
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
    """The draft to load: as given, the built-in one for the built-in target, or None."""
    if draft is None:
        return DRAFT if target == TARGET else None
    return None if draft.lower() == "none" else draft


def load_models(
    target: str, draft: str | None, dtype: str, device: str, batch: int = 1
) -> tuple[LoadedModel, LoadedModel | None]:
    """Target and draft (None for none) on the device that `auto` means here, and the threads for `batch` sequences at a
    time."""
    for option, value in (("target", target), ("draft", draft)):
        if value == "":
            raise SimsdError(f"--{option} is empty: give a built-in name ({TARGET}, {DRAFT}), a folder or a hub id")

    import torch

    from simsd.models.loading import load

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [None if name is None else load(name, dtype=dtype, device=device) for name in (target, draft)]
    if models[0].tokenizer is None:
        raise SimsdError(f"target {target} has no tokenizer: put its tokenizer.json and tokenizer_config.json there")
    threads.choose(models[0], batch)
    _tell_of_long_loads(models)
    return models[0], models[1]


def _tell_of_long_loads(models: list[LoadedModel | None]) -> None:
    """One line on standard error: GiB and seconds of each."""
    loaded = [model for model in models if model is not None]
    if sum(model.load_seconds for model in loaded) > LONG_LOAD_SECONDS:
        told = (f"{one.name}: {one.weight_bytes / 2**30:.2f} GiB in {one.load_seconds:.1f} s" for one in loaded)
        print(f"loaded {', '.join(told)}", file=sys.stderr)
