"""Tests of chance: is what is drawn distributed as the target's own softmax says?"""

from __future__ import annotations

import collections
import dataclasses
import itertools

import torch
from torch import Tensor

import simsd_kernels as kernels
from simsd.audit import chi_squared
from simsd.audit.forwards import allowed, decode, plain_logits
from simsd.audit.report import FAIL, INCONCLUSIVE, PASS, REPORTED, Check, Subject
from simsd.config import SamplingParams
from simsd.engine.decoder import Decoder
from simsd.engine.pair import sub_blocks
from simsd.models.loading import LoadedModel

DRAW_BATCH = 32
NATIVE_DRAWS = 8  # plain samples per text that is tested: the reference should be the sharper side
CONTEXTS = 8  # looked at in search of one that leaves much open
CONTEXT_TOKENS = 16
TRIALS = 64  # texts that show whether the target takes any of what is drafted
REPORTED_DRAWS = 1000  # enough for a figure that nothing depends on
STRATEGIES = ("sequential", "low_confidence_static")
MRS_TOP_K = 8
ROWS = 2**24  # logits that one call of the op may hold

Text = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Scene:
    """A context whose next few tokens are drawn again and again: `free` tokens, `top_k` ids for each."""

    context: list[int]
    free: int
    top_k: int


def tests(settings) -> int:
    """How many p-values an audit looks at."""
    return len(STRATEGIES) + 1 if "exact" in settings.modes else 0


def text_law(subject: Subject, strategy: str, alpha: float) -> Check:
    """Short texts of exact decoding at temperature 1, one per seed, against plain sampling."""
    scenes = open_scenes(subject, strategy)
    scene = next((s for s in scenes if drawn_texts(subject, s, strategy, TRIALS, verify="exact")[1]), scenes[0])
    texts, drafted = drawn_texts(subject, scene, strategy, subject.settings.seeds, verify="exact")
    plain = plain_texts(subject.target, scene, strategy, NATIVE_DRAWS * subject.settings.seeds, seed=1)
    counts = _aligned(texts, plain)
    figures = {"seeds": sum(texts.values()), "free": scene.free, "top_k": scene.top_k, "drafted": drafted}
    name = f"texts of {scene.free} tokens, {strategy}"
    return _judged(name, chi_squared.two_samples(*counts), alpha, figures, drafted > 0)


def mrs_text_law(subject: Subject, strategy: str) -> Check:
    """How far texts under verify="temporal", accept="mrs" are from native sampling; the rule does not promise them."""
    scene = open_scenes(subject, strategy)[0]
    seeds = min(subject.settings.seeds, REPORTED_DRAWS)
    texts, drafted = drawn_texts(subject, scene, strategy, seeds, verify="temporal", accept="mrs")
    plain = plain_texts(subject.target, scene, strategy, NATIVE_DRAWS * seeds, seed=1)
    again = plain_texts(subject.target, scene, strategy, seeds, seed=2)
    drift = chi_squared.total_variation(*_aligned(texts, plain))
    chance = chi_squared.total_variation(*_aligned(again, plain))
    figures = {"seeds": seeds, "drafted": drafted, "total_variation": drift, "chance": chance}
    summary = f"total variation {drift:.3f} from native sampling ({chance:.3f} between two native samples)"
    result = REPORTED if drafted else INCONCLUSIVE
    return Check("distribution", f"drift of mrs texts, {strategy}", "temporal", result, summary, figures)


def mrs_op_law(subject: Subject, alpha: float) -> Check:
    """The rule on real rows: x drawn from the draft's softmax, accepted or replaced, against the target's softmax."""
    target_logits, draft_logits = mrs_rows(subject)
    draws, top_k, vocabulary = 8 * subject.settings.seeds, MRS_TOP_K, target_logits.numel()
    banned = kernels.banned_mask(subject.target.banned_ids, vocabulary, target_logits.device)
    generator = torch.Generator().manual_seed(0)
    p, q = (probabilities(x[None], subject.target.banned_ids, top_k)[0] for x in (target_logits, draft_logits))
    drafts = torch.multinomial(q.cpu(), draws, replacement=True, generator=generator)
    coins, residuals = (torch.rand(draws, generator=generator) for _ in range(2))
    tokens, accepted = [], 0
    for part in torch.arange(draws).split(max(1, ROWS // vocabulary)):
        count = len(part)
        device = target_logits.device
        verdict = kernels.block_verify(
            target_logits.expand(count, 1, -1),
            drafts[part][:, None].to(device),
            torch.zeros(count, dtype=torch.int32, device=device),
            torch.ones(count, dtype=torch.int64, device=device),
            torch.ones(count, device=device),
            torch.full((count,), top_k, dtype=torch.int32, device=device),
            draft_logits=draft_logits.expand(count, 1, -1),
            coin=coins[part][:, None].to(device),
            residual=residuals[part].to(device),
            banned=banned,
            rule="mrs",
        )
        tokens.append(verdict.tokens[:, 0])
        accepted += int(verdict.accepted.sum())
    counts = torch.bincount(torch.cat(tokens).cpu(), minlength=vocabulary)
    figures = {"draws": draws, "top_k": top_k, "accepted": accepted / draws}
    fit = chi_squared.against_law(counts, p.cpu())
    return _judged("accepted or replaced token of mrs, one row", fit, alpha, figures, True)


def mrs_rows(subject: Subject) -> tuple[Tensor, Tensor]:
    """The target's and the draft's logits [V] of one position, where the draft is often right and often wrong.

    Without a draft, the target's own with one token less revealed: what a self-draft proposes from.
    """
    target, best = subject.target, None
    mask_id, length = target.mask_token_id, target.block_length
    for context in _contexts(subject, min(3, length)):
        start = len(context) // length * length
        prefix, known = context[:start], context[start:]
        blocks = [known + [mask_id] * (length - len(known))]
        now = plain_logits(target, prefix, blocks)[0]  # [L, V]
        if subject.draft is not None:
            theirs = plain_logits(subject.draft, prefix, blocks)[0]
        else:
            theirs = now
            revealed = int(allowed(now[len(known)], target.banned_ids).argmax())
            blocks[0][len(known)] = revealed
            now = plain_logits(target, prefix, blocks)[0]
        for pair in zip(now[len(known) :], theirs[len(known) :], strict=True):
            p, q = (probabilities(x[None], target.banned_ids, MRS_TOP_K)[0] for x in pair)
            overlap = float(torch.minimum(p, q).sum())
            worth = float(-(p * p.clamp(min=1e-30).log()).sum()) * min(overlap, 1 - overlap)
            if best is None or worth > best[0]:
                best = worth, pair
    return best[1]


def open_scenes(subject: Subject, strategy: str) -> list[Scene]:
    """Some contexts from the prompts, those with the most varied continuations first.

    So many tokens are free that some are revealed on drafted states: with a draft model one behind the first; without,
    the first two steps are native's, since a self-draft needs logits of the block and a state between.
    """
    length = subject.target.block_length
    free = 2 if subject.draft is not None else 3
    free = free if free <= length else -(-free // length) * length
    top_k = {1: 8, 2: 4, 3: 3}.get(free, 2)
    scenes = [Scene(context, free, top_k) for context in _contexts(subject, free)]
    return sorted(scenes, key=lambda scene: -_variety(plain_texts(subject.target, scene, strategy, 200, seed=0)))


def _contexts(subject: Subject, free: int) -> list[list[int]]:
    """Beginnings of prompts, repeated where they are too short, that leave `free` positions of their last block (or
    whole blocks)."""
    length, banned = subject.target.block_length, subject.target.banned_ids
    least = -free % length
    some_id = next(i for i in range(subject.target.vocab_size) if i not in banned)
    found: list[list[int]] = []
    for prompt in subject.prompts:
        text = prompt if len(prompt) >= least else (prompt or [some_id]) * least
        size = min(len(text), max(CONTEXT_TOKENS, least))
        context = text[: size - (size - least) % length]
        if context not in found:
            found.append(context)
    return found[:CONTEXTS]


def drawn_texts(
    subject: Subject, scene: Scene, strategy: str, count: int, verify: str, **changes
) -> tuple[collections.Counter[Text], int]:
    """How often `verify` gives each text over `count` seeds; how many drafted tokens exact took, or temporal judged."""
    draft = subject.temporal_draft if verify == "temporal" else subject.draft
    make = subject.exact if verify == "exact" else subject.config
    config = make(
        **({"verify": verify, "strategy": strategy, "temperature": 1.0, "top_k": scene.top_k} | changes),
        max_new_tokens=scene.free,
        end_token_ids=(),
    )
    seeds = range(count)
    decoder = Decoder(subject.target, [scene.context] * count, draft, config, seeds, max_batch=DRAW_BATCH)
    results = decode(decoder)
    if verify == "exact":
        drafted = sum(result.origins.count("drafted") for result in results)
    else:
        drafted = sum(result.stats.drafted for result in results)
    return collections.Counter(tuple(result.tokens) for result in results), drafted


@torch.inference_mode()
def plain_texts(target: LoadedModel, scene: Scene, strategy: str, draws: int, seed: int) -> collections.Counter[Text]:
    """`draws` texts by the book: a plain forward on each state, softmax, torch.multinomial, one position of the
    leftmost sub-block revealed.

    Draws that are in the same state share its forward and nothing else.
    """
    length, generator = target.block_length, torch.Generator().manual_seed(seed)
    borders = list(itertools.accumulate(sub_blocks(target, SamplingParams(), length)))
    end = len(scene.context) + scene.free
    start = len(scene.context) // length * length
    block = tuple(scene.context[start:]) + (None,) * (length - len(scene.context) + start)
    waiting = {(tuple(scene.context[:start]), block): draws}
    texts: collections.Counter[Text] = collections.Counter()
    while waiting:
        (prefix, block), count = waiting.popitem()
        masked = [i for i, token in enumerate(block) if token is None]
        if not masked:
            prefix, block = prefix + block, (None,) * length
            if len(prefix) < end:
                waiting[prefix, block] = waiting.get((prefix, block), 0) + count
            else:
                texts[prefix[len(scene.context) : end]] += count
            continue
        masked = [i for i in masked if i < next(border for border in borders if border > masked[0])]
        shown = [target.mask_token_id if token is None else token for token in block]
        logits = plain_logits(target, list(prefix), [shown])[0, masked]
        drawn = torch.multinomial(
            probabilities(logits, target.banned_ids, scene.top_k).cpu(), count, replacement=True, generator=generator
        )  # [masked, draws]
        if strategy == "sequential":
            at = torch.zeros(count, dtype=torch.long)
        else:  # confidence is the probability before top-k
            at = probabilities(logits, target.banned_ids, 0).cpu().gather(1, drawn).max(0).indices
        token = drawn.gather(0, at[None])[0]
        pairs, sizes = torch.stack([at, token]).unique(dim=1, return_counts=True)
        for (i, t), size in zip(pairs.T.tolist(), sizes.tolist(), strict=True):
            key = prefix, (*block[: masked[i]], t, *block[masked[i] + 1 :])
            waiting[key] = waiting.get(key, 0) + size
    return texts


def probabilities(logits: Tensor, banned: list[int], top_k: int) -> Tensor:
    """float64 [R, V]: softmax over the `top_k` best ids (0: all) of logits [R, V]."""
    x = allowed(logits, banned).double()
    if 0 < top_k < x.shape[1]:
        x = x.masked_fill(x < x.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    return x.softmax(1)


def _variety(texts: collections.Counter[Text]) -> float:
    shares = torch.tensor([*texts.values()], dtype=torch.float64) / sum(texts.values())
    return float(-(shares * shares.log()).sum())


def _aligned(first: collections.Counter[Text], second: collections.Counter[Text]) -> tuple[Tensor, Tensor]:
    """Both as counts [n] over the texts of either."""
    texts = sorted({*first, *second})
    return torch.tensor([first[text] for text in texts]), torch.tensor([second[text] for text in texts])


def _judged(name: str, fit: chi_squared.Fit | None, alpha: float, figures: dict, drafted: bool) -> Check:
    if fit is None:
        result, summary = INCONCLUSIVE, "too few draws in too few cells for a test"
    else:
        figures = figures | {"statistic": fit.statistic, "cells": fit.cells, "p": fit.p}
        result = PASS if fit.p >= alpha else FAIL
        summary = f"chi-squared {fit.statistic:.1f} in {fit.cells} cells, p = {fit.p:.3g}"
        if "seeds" in figures:
            summary += f" ({figures['seeds']} seeds)"
        else:
            summary += f" ({figures['draws']} draws, {figures['accepted']:.0%} accepted)"
    if result == PASS and not drafted:
        result, summary = INCONCLUSIVE, f"no token came from a draft; {summary}"
    return Check("distribution", name, "exact", result, summary, figures)
