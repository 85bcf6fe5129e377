"""What an audit is asked and what it answers: settings, checks, the report of them all."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from simsd.config import MAX_BATCH, STRATEGIES, GenerationConfig
from simsd.errors import SimsdError
from simsd.models.loading import LoadedModel

PASS, FAIL, REPORTED, INCONCLUSIVE = "PASS", "FAIL", "REPORT", "INCONCLUSIVE"
RESULTS = (PASS, FAIL, REPORTED, INCONCLUSIVE)
PARTS = ("equality", "leak", "context", "distribution")
MODES = ("exact", "temporal", "both")
FALSE_ALARM = 1e-3  # of the whole audit, over all its tests of chance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How much to audit; a bad value raises `SimsdError`.

    Attributes:
        verify: "exact" (required to pass), "temporal" (figures reported, nothing required) or "both".
        strategies: for equality, each greedy and sampled.
        temperature: of the sampled equality runs; 0 leaves the greedy ones only.
        max_new_tokens: per prompt. batch: prompts at a time, beside one at a time.
        blocks: drafted blocks per prompt that temporal's leak and context are measured on.
        states: verified states that are compared with forwards of their own.
        seeds: texts drawn per distribution test.
    """

    verify: str = "both"
    strategies: tuple[str, ...] = STRATEGIES
    temperature: float = 1.0
    max_new_tokens: int = 32
    batch: int = MAX_BATCH
    blocks: int = 3
    states: int = 200
    seeds: int = 3000

    def __post_init__(self) -> None:
        if self.verify not in MODES:
            raise SimsdError(f"verify must be one of {', '.join(MODES)}; got {self.verify!r}")
        if not self.strategies or len(set(self.strategies)) != len(self.strategies):
            raise SimsdError(f"strategies must be named once each, got {', '.join(self.strategies) or 'none'}")
        for name in ("max_new_tokens", "batch", "blocks", "states", "seeds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SimsdError(f"{name} must be an integer >= 1, got {value!r}")
        for strategy in self.strategies:
            GenerationConfig(strategy=strategy, temperature=self.temperature)

    @property
    def modes(self) -> tuple[str, ...]:
        return ("exact", "temporal") if self.verify == "both" else (self.verify,)

    @property
    def temperatures(self) -> tuple[float, ...]:
        return (0.0, self.temperature) if self.temperature else (0.0,)


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is audited: prompts as token ids, at least one."""

    target: LoadedModel
    draft: LoadedModel | None
    prompts: list[list[int]]
    settings: Settings

    @property
    def drafter(self) -> str:
        """Who drafts for the exact verifier, in every block: whether it pays is not asked here."""
        return "self" if self.draft is None else "model"

    @property
    def temporal_draft(self) -> LoadedModel:
        """`temporal` has no self-draft: without a draft model the target is its own."""
        return self.target if self.draft is None else self.draft

    def config(self, **changes: Any) -> GenerationConfig:
        """`max_rows` is set, so that how many states are drafted does not depend on the machine's mood."""
        common = {
            "max_new_tokens": self.settings.max_new_tokens,
            "max_rows": 256,
            "block_length": self.target.block_length,
        }
        return GenerationConfig(**common | changes)

    def exact(self, **changes: Any) -> GenerationConfig:
        return self.config(**{"verify": "exact", "drafter": self.drafter} | changes)


@dataclasses.dataclass
class Check:
    """One line of the report.

    Attributes:
        part: one of PARTS. name: what was checked. verify: "exact" or "temporal".
        result: PASS or FAIL where something is required, REPORT for a figure that is not, INCONCLUSIVE where there was
            too little to judge by.
        summary: the figures in words. figures: the same as numbers. details: one entry per prompt that differs, or the
            single measurements.
    """

    part: str
    name: str
    verify: str
    result: str
    summary: str
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    details: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Report:
    """`alpha`: a test of chance fails below this p-value: FALSE_ALARM over the number of such tests."""

    checks: list[Check]
    target: str
    draft: str | None
    prompts: int
    settings: dict[str, Any]
    machine: dict[str, Any]
    alpha: float
    complete: bool = True

    @property
    def passed(self) -> bool:
        """Whether nothing that is required failed."""
        return not any(check.result == FAIL for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        counts = {result: sum(check.result == result for check in self.checks) for result in RESULTS}
        return {"passed": self.passed, "counts": counts} | dataclasses.asdict(self)

    def upshot(self) -> str:
        """One sentence."""
        counts = {result: [check.result for check in self.checks].count(result) for result in RESULTS}
        parts = [f"{count} {result}" for result, count in counts.items() if count]
        verdict = "no required check failed" if self.passed else "a required check failed"
        if not counts[PASS] and self.passed:
            verdict = "nothing that is required was shown"
        return f"Audit: {verdict} ({', '.join(parts) or 'no checks'})."

    def caption(self) -> list[str]:
        draft = "the target itself" if self.draft is None else self.draft
        where = f"{self.machine['device']}, {self.machine['dtype']}, torch {self.machine['torch']}"
        return [
            f"Target {self.target}, draft {draft}, {self.prompts} prompts, at most {self.settings['max_new_tokens']} "
            f"new tokens; {where}, threads {self.machine['threads']}.",
            f"Tests of chance fail below p = {self.alpha:.1e}: a false alarm anywhere in the audit has probability "
            f"below {FALSE_ALARM:g} (Bonferroni).",
        ]

    def differences(self) -> list[tuple[Check, dict[str, Any]]]:
        """First differences of the checks that failed."""
        failed = (check for check in self.checks if check.part == "equality" and check.result == FAIL)
        return [(check, difference) for check in failed for difference in check.details]

    def markdown(self) -> str:
        lines = ["| part | check | verify | result | figures |", "| --- | --- | --- | --- | --- |"]
        for c in self.checks:
            lines.append(f"| {c.part} | {c.name} | {c.verify} | {c.result} | {c.summary.replace('|', chr(92) + '|')} |")
        parts = ["\n".join(lines)]
        if found := self.differences():
            parts.append("\n".join(f"- {check.name}: {describe(difference)}" for check, difference in found))
        parts += ["\n".join(self.caption()), f"**{self.upshot()}**"]
        if not self.complete:
            parts.append("**interrupted: the checks that were left are missing**")
        return "\n\n".join(parts) + "\n"


def describe(difference: dict[str, Any]) -> str:
    """A first difference in words."""

    def margin(value: float | None) -> str:
        return "-" if value is None else f"{value:+.4g}"

    return (
        f"prompt {difference['prompt']}, {difference['how']}: token {difference['token']} (block "
        f"{difference['block']}, position {difference['position']}): native {difference['native_token']} at step "
        f"{difference['native_step']}, here {difference['other_token']} at step {difference['other_step']}; margin "
        f"{margin(difference['margin_native_context'])} in native's context, "
        f"{margin(difference['margin_other_context'])} in the other's"
    )


def machine(target: LoadedModel) -> dict[str, Any]:
    """What the audit ran on."""
    from simsd_kernels import __version__

    device = target.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(target.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "simsd_kernels": __version__,
    }
