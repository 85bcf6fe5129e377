"""An audit of speculative decoding on anybody's model: texts, leaks, contexts, distributions.

from simsd import audit

report = audit.run(target, draft, prompts)
print(report.markdown())
assert report.passed
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from simsd import tasks
from simsd.audit import context, distribution, equality, leak
from simsd.audit.report import (
    FAIL,
    FALSE_ALARM,
    INCONCLUSIVE,
    PASS,
    REPORTED,
    Check,
    Report,
    Settings,
    Subject,
    describe,
    machine,
)
from simsd.engine.decoder import Decoder
from simsd.errors import SimsdError
from simsd.models.loading import LoadedModel
from simsd.prompts import encode_prompts

__all__ = [
    "FAIL",
    "INCONCLUSIVE",
    "PASS",
    "REPORTED",
    "Check",
    "Report",
    "Settings",
    "Stage",
    "describe",
    "finish",
    "run",
    "stages",
]


ITEMS = 5  # built-in tasks per family


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of an audit that takes a while; `run()` gives its checks."""

    name: str
    run: Callable[[], list[Check]]


def run(
    target: LoadedModel,
    draft: LoadedModel | None = None,
    prompts: Sequence[Any] | None = None,
    settings: Settings | None = None,
    progress: Callable[[Stage], None] | None = None,
) -> Report:
    """Audits speculative decoding of `target`.

    Args:
        target: the model whose text must not change.
        draft: a draft model; None leaves drafting to the target itself (for "temporal" as its own draft model).
        prompts: as `simsd.generate` takes them, in a list; None for built-in tasks, ITEMS of each family.
        settings: how much to audit.
        progress: called with each stage before it runs.

    Raises:
        SimsdError: bad settings or prompts, models that do not fit together; before anything is decoded.
    """
    settings = settings or Settings()
    todo = stages(target, draft, prompts, settings)
    checks: list[Check] = []
    for stage in todo:
        if progress is not None:
            progress(stage)
        checks += stage.run()
    return finish(checks, target, draft, prompts, settings)


def stages(
    target: LoadedModel, draft: LoadedModel | None, prompts: Sequence[Any] | None, settings: Settings
) -> list[Stage]:
    """The audit in stages, for a caller that shows progress or may be interrupted; arguments are checked here."""
    prompts = default_prompts() if prompts is None else list(prompts)
    encoded = encode_prompts(target, prompts)
    if not encoded:
        raise SimsdError("an audit needs at least one prompt, got none")
    subject = Subject(target, draft, encoded, settings)
    Decoder(target, encoded, draft, subject.exact(lookahead=3))  # refuses what does not fit
    alpha = threshold(settings)

    def one(function, *arguments) -> Callable[[], list[Check]]:
        return lambda: [function(subject, *arguments)]

    found: list[Stage] = []
    for mode in settings.modes:
        for strategy in settings.strategies:
            for temperature in settings.temperatures:
                name = f"equality, {mode}, {strategy}"
                found.append(Stage(name, one(equality.equality, mode, strategy, temperature)))
    if "exact" in settings.modes:
        found.append(Stage("leak, exact", one(leak.exact_leak)))
        found.append(Stage("context, exact", functools.partial(context.exact_context, subject)))
    if "temporal" in settings.modes:
        found.append(Stage("leak and context, temporal", lambda: _temporal(subject)))
    if "exact" in settings.modes:
        for strategy in distribution.STRATEGIES:
            found.append(Stage(f"distribution, {strategy}", one(distribution.text_law, strategy, alpha)))
        found.append(Stage("distribution, mrs", one(distribution.mrs_op_law, alpha)))
    if "temporal" in settings.modes:
        for strategy in distribution.STRATEGIES:
            found.append(Stage(f"drift of mrs, {strategy}", one(distribution.mrs_text_law, strategy)))
    return found


def finish(
    checks: list[Check],
    target: LoadedModel,
    draft: LoadedModel | None,
    prompts: Sequence[Any] | None,
    settings: Settings,
    complete: bool = True,
) -> Report:
    """The report of the checks so far."""
    return Report(
        checks=checks,
        target=target.name,
        draft=None if draft is None else draft.name,
        prompts=len(default_prompts() if prompts is None else prompts),
        settings=dataclasses.asdict(settings),
        machine=machine(target),
        alpha=threshold(settings),
        complete=complete,
    )


def threshold(settings: Settings) -> float:
    """The p-value below which one test of chance fails."""
    return FALSE_ALARM / max(distribution.tests(settings), 1)


def default_prompts(items: int = ITEMS) -> list[str]:
    """`items` held-out questions of each built-in task family."""
    if items < 1:
        raise SimsdError(f"items must be at least 1 per family, got {items}")
    return [task.prompt for family in tasks.FAMILIES for task in tasks.held_out(family, items)]


def _temporal(subject: Subject) -> list[Check]:
    blocks = leak.drafted_blocks(subject)
    return [leak.temporal_leak(subject, blocks), leak.temporal_context(subject, blocks)]
