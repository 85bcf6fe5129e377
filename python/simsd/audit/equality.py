"""Texts token by token: native decoding against a speculative one."""

from __future__ import annotations

import dataclasses
from typing import Any

from simsd.audit.forwards import decode, plain_logits
from simsd.audit.report import FAIL, INCONCLUSIVE, PASS, REPORTED, Check, Subject
from simsd.engine.decoder import Decoder
from simsd.models.loading import LoadedModel
from simsd.results import Result, Stats


def equality(subject: Subject, verify: str, strategy: str, temperature: float) -> Check:
    """Decodes every prompt natively, one at a time, and again by `verify` in several ways.

    One at a time and in a batch, with every drafter there is. `exact` must give native's tokens and step map; what
    `temporal` gives is reported.
    """
    seeds = list(range(len(subject.prompts)))
    common = {"strategy": strategy, "temperature": temperature}
    native = decode(
        Decoder(subject.target, subject.prompts, None, subject.config(verify="none", **common), seeds, max_batch=1)
    )
    details, compared, equal, same_probs, stats = [], 0, 0, 0, Stats()
    for how, config, draft, batch in _ways(subject, verify, common):
        results = decode(Decoder(subject.target, subject.prompts, draft, config, seeds, max_batch=batch))
        for number, pair in enumerate(zip(native, results, strict=True)):
            found = first_difference(subject.target, *pair, with_steps=verify == "exact")
            compared, equal = compared + 1, equal + (found is None)
            same_probs += pair[0].probs == pair[1].probs
            stats = stats + pair[1].stats
            if found is not None:
                details.append({"prompt": number, "how": how} | found)
    figures = {
        "texts": compared,
        "equal": equal,
        "same_probabilities": same_probs,
        "not_finite": sum(result.finish_reason == "failed" for result in native),
        "tokens": stats.new_tokens,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "target_forwards": stats.target_forwards,
        "native_forwards": sum(result.stats.target_forwards for result in native) * (compared // max(len(native), 1)),
    }
    summary = f"{equal} of {compared} texts equal native's"
    if stats.drafted:
        summary += f"; {stats.drafted} tokens drafted, {stats.accepted / stats.drafted:.0%} accepted"
        summary += f", {figures['target_forwards'] / max(figures['native_forwards'], 1):.2f} x native's forwards"
    else:
        summary += "; nothing was drafted"
    if verify == "exact" and same_probs < equal:
        summary += f"; probabilities differ in {compared - same_probs}"
    if figures["not_finite"]:
        summary += f"; native's logits were not finite in {figures['not_finite']} of {len(native)} prompts"
    drawn = f"temperature {temperature:g}" if temperature else "greedy"
    if verify == "exact" and equal < compared:
        result = FAIL
    elif not stats.drafted or figures["not_finite"]:
        result = INCONCLUSIVE
    else:
        result = PASS if verify == "exact" else REPORTED
    return Check("equality", f"{strategy}, {drawn}", verify, result, summary, figures, details)


def _ways(subject: Subject, verify: str, common: dict[str, Any]) -> list[tuple]:
    """(name, config, draft, batch) of the speculative decodings to compare."""
    batch = subject.settings.batch
    if verify == "temporal":
        config = subject.config(verify="temporal", **common)
        return [(f"batch {n}", config, subject.temporal_draft, n) for n in dict.fromkeys((1, batch))]
    config = subject.exact(**common)
    drafters = dict.fromkeys((subject.drafter, "self", "lookup", "auto"))
    ways = [(f"drafter {drafter}, batch {batch}", drafter, batch) for drafter in drafters]
    if batch > 1:
        ways.insert(0, (f"drafter {subject.drafter}, batch 1", subject.drafter, 1))
    return [(how, dataclasses.replace(config, drafter=drafter), subject.draft, n) for how, drafter, n in ways]


def first_difference(
    target: LoadedModel, native: Result, other: Result, with_steps: bool = True
) -> dict[str, Any] | None:
    """Where `other` first leaves `native`, None if nowhere.

    With steps the first is the earliest step of the first block that differs (tokens or step map), else the first
    token. A margin is the target's logit of native's token minus that of the other's, by a plain forward on the block
    as it was just before that decoder revealed the position (what an answer's end cut off counts as masked): positive
    where the target, greedy, prefers native's. None where one of them has no token there.
    """
    length, known = target.block_length, len(native.prompt_tokens)
    size = max(len(native.tokens), len(other.tokens))
    columns = []
    for result in (native, other):
        steps = result.step_map if with_steps else [0] * len(result.tokens)
        columns.append([*zip(result.tokens, steps, strict=True)] + [(None, 0)] * (size - len(result.tokens)))
    differing = [i for i in range(size) if columns[0][i] != columns[1][i]]
    if not differing:
        return None
    block = (known + differing[0]) // length
    inside = [i for i in differing if (known + i) // length == block]
    # A position that one of them lacks has no step there.
    at = min(inside, key=lambda i: min((c[i][1] for c in columns if c[i][0] is not None), default=0))
    tokens = [result.tokens[at] if at < len(result.tokens) else None for result in (native, other)]
    steps = [result.step_map[at] if at < len(result.tokens) else None for result in (native, other)]
    margins: list[float | None] = [None, None]
    if None not in tokens:
        for n, result in enumerate((native, other)):
            logits = _before(target, result, at)
            margins[n] = float(logits[tokens[0]].float() - logits[tokens[1]].float())
    return {
        "token": at,
        "block": block,
        "position": (known + at) % length,
        "native_token": tokens[0],
        "other_token": tokens[1],
        "native_step": steps[0],
        "other_step": steps[1],
        "margin_native_context": margins[0],
        "margin_other_context": margins[1],
    }


def _before(target: LoadedModel, result: Result, at: int):
    """[V]: the target's logits at generated token `at` before it was revealed."""
    length, prompt = target.block_length, result.prompt_tokens
    text = prompt + result.tokens
    start = (len(prompt) + at) // length * length
    block = []
    for position in range(start, start + length):
        i = position - len(prompt)
        shown = i < 0 or (i < len(result.tokens) and result.step_map[i] < result.step_map[at])
        block.append(text[position] if shown else target.mask_token_id)
    return plain_logits(target, text[:start], [block])[0, len(prompt) + at - start]
