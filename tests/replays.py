"""Slow replays of the decoding algorithms that keep no cache and run one plain forward per question."""

from __future__ import annotations

import itertools
import math

import torch

from simsd import GenerationConfig
from simsd_kernels import INF, banned_mask, sample_logits
from stand_ins import END, MASK, VOCABULARY

PROMPTS = [[5, 3], [7], [1, 2, 3, 4, 5, 6], [9, 8, 7, 6], list(range(1, 20))]
STRATEGIES = [
    {"strategy": "sequential"},
    {"strategy": "low_confidence_static"},
    {"strategy": "low_confidence_dynamic", "threshold": 0.4},
    {"strategy": "entropy_bounded", "entropy_bound": 1.0},
]


def log_odds(x: torch.Tensor, token: int) -> float:
    others = torch.cat([x[:token], x[token + 1 :]])
    return float(x[token] - torch.logsumexp(others, 0))


def draw(x: torch.Tensor, config: GenerationConfig, position: int, revealed: int) -> int:
    """The op's own draw for one row: the noise has its tests elsewhere."""
    token, *_ = sample_logits(
        x[None],
        torch.tensor([config.temperature]),
        torch.tensor([config.top_k], dtype=torch.int32),
        torch.tensor([config.top_p]),
        torch.tensor([config.seed]),
        torch.tensor([position], dtype=torch.int32),
        torch.tensor([0 if config.strategy == "sequential" else revealed]),
        banned_mask([MASK], len(x)),
        backend="reference",
    )
    return int(token)


def block_logits(model, prefix: list[int], state: list[int]) -> torch.Tensor:
    """Logits [4, V] of what tells of each position of a block: its own row or, of a model that shifts, the row before
    it, which a text's first position does not have."""
    with torch.no_grad():
        logits = model.model(torch.tensor([prefix + state])).logits[0].float()
    logits[:, MASK] = -math.inf
    rows = range(len(prefix), len(prefix) + len(state))
    return logits[[max(row - model.shift, 0) for row in rows]]


def replay_block(model, prefix: list[int], known: list[int], config: GenerationConfig, steps: int | None = None):
    """One block by plain forwards: tokens, reveal steps and the revealed set each was drawn under."""
    length = 4
    state = known + [MASK] * (length - len(known))
    hidden = set(range(len(known), length))
    taken, under = [0] * length, [0] * length
    size = config.sub_block_length or length
    counts = config.reveal_counts(length, [min(size, length - first) for first in range(0, length, size)])
    for step, count in enumerate(counts[:steps]):
        logits = block_logits(model, prefix, state)
        x = logits / (config.temperature or 1.0)
        revealed = sum(1 << i for i in range(length) if i not in hidden)
        leftmost = min(hidden) // size
        masked = {i for i in hidden if i // size == leftmost or step == len(counts) - 1}
        token = {i: draw(logits[i], config, len(prefix) + i, revealed) for i in masked}
        odds = {i: log_odds(x[i], token[i]) for i in masked}
        prob = {i: float(x[i].softmax(0)[token[i]]) for i in masked}
        entropy = {i: float(torch.distributions.Categorical(logits=x[i]).entropy()) for i in masked}
        by_odds = sorted(masked, key=lambda i: (-odds[i], i))
        if step == len(counts) - 1:
            chosen = set(masked)
        elif config.strategy == "sequential":
            chosen = set(sorted(masked)[:count])
        elif config.strategy == "low_confidence_static":
            chosen = set(by_odds[:count])
        elif config.strategy == "low_confidence_dynamic":
            sure = {i for i in masked if prob[i] > config.threshold}
            chosen = sure if len(sure) >= min(count, len(masked)) else set(by_odds[:count])
        else:
            by_entropy = sorted(masked, key=lambda i: (entropy[i], i))
            sums = itertools.accumulate(entropy[i] for i in by_entropy)
            chosen = set(by_entropy[: max(1, sum(s < config.entropy_bound for s in sums))])
        for i in chosen:
            state[i], taken[i], under[i] = token[i], step + 1, revealed
        hidden -= chosen
        if not hidden:
            break
    return state, taken, under


def replay_native(model, prompt: list[int], config: GenerationConfig):
    tokens, steps = list(prompt), []
    while len(tokens) < len(prompt) + config.max_new_tokens:
        start = len(tokens) // 4 * 4
        known = tokens[start:]
        block, taken, _ = replay_block(model, tokens[:start], known, config)
        for token, step in zip(block[len(known) :], taken[len(known) :], strict=True):
            tokens.append(token)
            steps.append(step)
            if token == END or len(tokens) == len(prompt) + config.max_new_tokens:
                return tokens[len(prompt) :], steps
    return tokens[len(prompt) :], steps


def temporal_logits(model, prefix: list[int], known: list[int], block: list[int], taken: list[int]) -> torch.Tensor:
    """Target logits [4, V] of a drafted block, by DESIGN's temporal table row by row; no cache.

    Where a row predicts the next position, a position is judged by a row more, the one before it as it was when the
    draft revealed it."""
    stride, base = 1000, len(prefix) // 4 * 1000
    rows = []  # token, position, clock, birth, death
    for i, token in enumerate(prefix):
        rows.append((token, i, i // 4 * stride, i // 4 * stride, INF))
    for i, token in enumerate(known):
        rows.append((token, len(prefix) + i, base, base, INF))
    unknown = range(len(known), 4)
    step = [0] * len(known) + [taken[i] or 5 for i in unknown]
    for i in unknown:
        if taken[i]:
            rows.append((block[i], len(prefix) + i, base + taken[i] + 1, base + taken[i] + 1, INF))
    for i in unknown:
        rows.append((MASK, len(prefix) + i, base + step[i], base + 1, base + step[i]))
    for i in unknown if model.shift else ():
        at, moment = len(prefix) + i - 1, base + step[i]
        if i:
            token = (known + block[len(known) :])[i - 1] if step[i - 1] < step[i] else MASK
        elif prefix:
            token, moment = prefix[-1], base - stride
        else:
            token, at = MASK, 0
        rows.append((token, at, moment, INF, INF))
    token, position, clock, birth, death = (
        torch.tensor([column], dtype=torch.int32) for column in zip(*rows, strict=True)
    )
    with torch.no_grad():
        logits = model.model(token.long(), position_ids=position.long(), clock=clock, birth=birth, death=death).logits[
            0
        ]
    logits[:, MASK] = -math.inf
    return torch.cat([torch.zeros(len(known), VOCABULARY), logits[-len(unknown) :]])


def replay_simsd(target, draft, prompt: list[int], config: GenerationConfig):
    """SimSD with rule `match` and `truncate`; tokens, how each came, and the number of verifications."""
    tokens, origins, rounds = list(prompt), [], 0
    limit = len(prompt) + config.max_new_tokens
    while len(tokens) < limit:
        start = len(tokens) // 4 * 4
        known = tokens[start:]
        block, taken, under = replay_block(draft, tokens[:start], known, config, config.draft_steps)
        logits = temporal_logits(target, tokens[:start], known, block, taken)
        rounds += 1
        for i in range(len(known), 4):
            own = draw(logits[i], config, start + i, under[i])
            tokens.append(own)
            origins.append("undrafted" if not taken[i] else "drafted" if own == block[i] else "bonus")
            if own == END or len(tokens) == limit:
                return tokens[len(prompt) :], origins, rounds
            if origins[-1] == "bonus":
                break
    return tokens[len(prompt) :], origins, rounds
