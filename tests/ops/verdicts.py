"""Calls of block_verify, by hand or at random, and the plain loop over a block that all its rules are."""

from __future__ import annotations

import torch

import simsd_kernels
from arguments import Pick, relaid
from backends import FLOATS, callable_of, sized
from logits import VOCABULARIES, random_banned, random_values

block_verify, sample_logits = callable_of("block_verify"), callable_of("sample_logits")
ALL = -1  # every bit
DECISIONS = ("accepted", "bonus", "tokens", "target_ids")
BELOW_ONE = 1 - 2.0**-24


def arguments(target, draft_ids, known=0, drafted=ALL, temperature=0.0, top_k=None, top_p=None, **rest):
    """The op's keyword arguments; numbers are spread over the batch, a seed brings position and revealed along."""
    batch, length, _ = target.shape

    def spread(value, dtype, *shape):
        return None if value is None else torch.as_tensor(value).to(dtype).expand(batch, *shape).clone()

    made = {
        "target_logits": target,
        "draft_ids": torch.as_tensor(draft_ids).expand(batch, length).clone(),
        "known": spread(known, torch.int32),
        "drafted": spread(drafted, torch.int64),
        "temperature": spread(temperature, torch.float32),
        "top_k": spread(top_k, torch.int32),
        "top_p": spread(top_p, torch.float32),
    }
    if "seed" in rest:
        made["seed"] = spread(rest.pop("seed"), torch.int64)
        made["position"] = spread(rest.pop("position", torch.arange(length)), torch.int32, length)
        made["revealed"] = spread(rest.pop("revealed", 0), torch.int64, length)
    if "banned" in rest:
        made["banned"] = simsd_kernels.banned_mask(rest.pop("banned"), target.shape[2])
    return {**made, **rest}


def verify(target, draft_ids, *, backend=None, **settings):
    return block_verify(**arguments(target, draft_ids, **settings), backend=backend)


def random_logits(*shape, seed=0, scale=2.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def random_case(seed: int):
    """A target, draft ids that mostly are what it would take, so that walks get somewhere, and the other settings."""
    pick = Pick(seed)
    batch, length = pick(1, 2, 4), pick(1, 2, 4, 7, 33, 64) if seed % 8 == 0 else pick(1, 2, 4, 7)
    vocabulary = pick(*VOCABULARIES[:10]) if length > 7 else pick(*VOCABULARIES)
    batch = sized(batch, interpreted=min(batch, 8 // length or 1))
    values = random_values(pick, batch, length, vocabulary)
    match pick("near", "same", "unrelated"):
        case "near":
            draft = values + pick.normal(batch, length, vocabulary) * 0.5
        case "same":
            draft = values
        case _:
            draft = random_values(pick, batch, length, vocabulary)
    settings = {
        "known": pick.integers(0, length + 1, batch) * (pick.uniform(batch) < 0.5),
        "drafted": pick.integers(-(2**63), 2**63 - 1, batch) | pick.integers(-(2**63), 2**63 - 1, batch),
        "temperature": pick.each(batch, 0.0, 0.4, 1.0, 1.7),
        "top_k": pick.each(batch, 0, 1, 3, vocabulary // 2, vocabulary + 1) if pick(False, True) else None,
        "top_p": pick.each(batch, 1.0, 0.0, 0.5, 0.95) if pick(False, True) else None,
        "rule": pick("match", "mrs"),
    }
    if banned := random_banned(pick, vocabulary):
        settings["banned"] = banned
    if settings["rule"] == "mrs":
        coin, residual = pick.uniform(batch, length), pick.uniform(batch)
        coin[pick.uniform(batch, length) < 0.1] = pick(0.0, BELOW_ONE)
        residual[pick.uniform(batch) < 0.1] = pick(0.0, BELOW_ONE)
        draft = relaid(draft.to(pick(*FLOATS)), pick)
        settings |= {"draft_logits": draft, "coin": relaid(coin, pick), "residual": relaid(residual, pick)}
    else:
        settings |= {"seed": pick.integers(-(2**63), 2**63 - 1, batch), "revealed": pick.integers(0, 2**62, batch, 1)}
    target = relaid(values.to(pick(*FLOATS)), pick)
    own = verify(target, torch.zeros(batch, length, dtype=torch.int64), backend="reference", **settings).target_ids
    ids = torch.where(pick.uniform(batch, length) < 0.75, own, pick.integers(0, vocabulary, batch, length))
    position = torch.arange(length)
    judged = (position >= settings["known"][:, None]) & ((settings["drafted"][:, None] >> position) & 1 == 1)
    return target, torch.where(judged, ids, pick.integers(-5, vocabulary + 5, batch, length)), settings


def one_of(b: int, settings: dict) -> dict:
    return {n: x[b : b + 1] if torch.is_tensor(x) and n != "banned" else x for n, x in settings.items()}


def walk(draft_ids, target_ids, known, drafted, accepts):
    """The rule for one block, position by position: accepted, bonus, tokens. `accepts(i)` judges a drafted position."""
    tokens, accepted = [-1] * len(draft_ids), 0
    tokens[:known] = draft_ids[:known]
    for i in range(known, len(draft_ids)):
        if not int(drafted) >> i & 1:
            tokens[i] = target_ids[i]
        elif accepts(i):
            tokens[i] = draft_ids[i]
            accepted += 1
        else:
            tokens[i] = target_ids[i]
            return accepted, target_ids[i], tokens
    return accepted, -1, tokens
