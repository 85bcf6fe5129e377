"""The CUDA kernels of block_verify, run on the CPU, against the definition and C++."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_cuda_sample_logits import DTYPES, VOCABULARIES, Dice, laid_out, random_banned, random_values

import simsd_kernels
from backends import unsafe
from simsd_kernels import dispatch
from test_block_verify import REFUSED, arguments, good_arguments, random_logits, uniform, verify

BELOW_ONE = 1 - 2.0**-24
DECISIONS = ("accepted", "bonus", "tokens", "target_ids")


def random_case(seed):
    """A target, and the settings of a call but its draft ids."""
    dice = Dice(seed)
    batch, length = dice.pick(1, 2, 4), dice.pick(1, 2, 4, 7, 33, 64) if seed % 8 == 0 else dice.pick(1, 2, 4, 7)
    vocabulary = dice.pick(*VOCABULARIES[:8]) if length > 7 else dice.pick(*VOCABULARIES)
    values = random_values(dice, batch, length, vocabulary)
    match dice.pick("near", "same", "unrelated"):
        case "near":
            draft = values + dice.normal(batch, length, vocabulary) * 0.5
        case "same":
            draft = values
        case _:
            draft = random_values(dice, batch, length, vocabulary)
    settings = {
        "known": dice.integers(0, length + 1, batch) * (dice.uniform(batch) < 0.5),
        "drafted": dice.integers(-(2**63), 2**63 - 1, batch) | dice.integers(-(2**63), 2**63 - 1, batch),
        "temperature": dice.each(batch, 0.0, 0.4, 1.0, 1.7),
        "top_k": dice.each(batch, 0, 1, 3, vocabulary // 2, vocabulary + 1) if dice.pick(False, True) else None,
        "top_p": dice.each(batch, 1.0, 0.0, 0.5, 0.95) if dice.pick(False, True) else None,
        "rule": dice.pick("match", "mrs"),
    }
    if banned := random_banned(dice, vocabulary):
        settings["banned"] = banned
    if settings["rule"] == "mrs":
        coin, residual = dice.uniform(batch, length), dice.uniform(batch)
        coin[dice.uniform(batch, length) < 0.1] = dice.pick(0.0, BELOW_ONE)
        residual[dice.uniform(batch) < 0.1] = dice.pick(0.0, BELOW_ONE)
        draft = laid_out(dice, draft.to(dice.pick(*DTYPES)))
        settings |= {"draft_logits": draft, "coin": coin, "residual": residual}
    else:
        settings |= {"seed": dice.integers(-(2**63), 2**63 - 1, batch), "revealed": dice.integers(0, 2**62, batch, 1)}
    return dice, laid_out(dice, values.to(dice.pick(*DTYPES))), settings


def drafted_ids(dice, target, settings):
    """Mostly what the target would take, so that walks get somewhere; garbage where nobody looks."""
    batch, length, vocabulary = target.shape
    own = verify(target, torch.zeros(batch, length, dtype=torch.int64), backend="reference", **settings).target_ids
    ids = torch.where(dice.uniform(batch, length) < 0.75, own, dice.integers(0, vocabulary, batch, length))
    position = torch.arange(length)
    judged = (position >= settings["known"][:, None]) & ((settings["drafted"][:, None] >> position) & 1 == 1)
    return torch.where(judged, ids, dice.integers(-5, vocabulary + 5, batch, length))


def one_of(b, value):
    return value[b : b + 1] if torch.is_tensor(value) else value


@pytest.mark.parametrize("seed", range(400))
def test_verdicts_are_those_of_the_definition(seed):
    dice, target, settings = random_case(seed)
    draft_ids = drafted_ids(dice, target, settings)
    out = verify(target, draft_ids, backend="cuda", **settings)
    for backend in ("reference", "cpu"):
        expected = verify(target, draft_ids, backend=backend, **settings)
        for name in DECISIONS:
            assert torch.equal(getattr(out, name), getattr(expected, name)), (backend, name)
        torch.testing.assert_close(out.prob, expected.prob, rtol=5e-6, atol=5e-6)
    b = seed % target.shape[0]
    alone = {name: value if name == "banned" else one_of(b, value) for name, value in settings.items()}
    again = verify(target[b : b + 1], draft_ids[b : b + 1], backend="cuda", **alone)
    assert all(torch.equal(x[b : b + 1], y) for x, y in zip(out, again, strict=True))


def test_known_rows_are_not_read_nor_draft_rows_that_were_not_drafted():
    batch, length, vocabulary = 2, 4, 2048
    target, draft = random_logits(batch, length, vocabulary), random_logits(batch, length, vocabulary, seed=1)
    draft_ids, coin = target.argmax(dim=2), torch.zeros(batch, length)  # a coin of 0 accepts
    take = lambda: json.loads(torch.ops.simsd_emulated.take_counters())["loaded_bytes"]  # noqa: E731
    settings = {"temperature": 1.0, "rule": "mrs", "coin": coin, "residual": uniform(batch), "draft_logits": draft}
    take()
    verify(target, draft_ids, known=torch.tensor([1, 3]), drafted=0b0110, backend="cuda", **settings)
    assert take() == (3 + 1 + 2 + 0) * vocabulary * 4
    verify(target, draft_ids, known=1, backend="cuda")
    assert take() == 2 * 3 * vocabulary * 4


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_residual_draw_is_the_inverse_of_the_cumulative_surplus(dtypes):
    """Every residual of a fine grid, on a vocabulary of several segments."""
    vocabulary, count = 2500, 64
    target = random_logits(vocabulary, seed=3).to(dtypes[0])
    draft = random_logits(vocabulary, seed=4).to(dtypes[1])
    p, q = target.float().softmax(dim=0), draft.float().softmax(dim=0)
    surplus = (p - q).clamp(min=0).double()
    rejected = int((q - p).argmax())
    residual = (torch.arange(count) + 0.5) / count
    out = verify(
        *(target.expand(count, 1, vocabulary), torch.full((count, 1), rejected)), temperature=1.0, rule="mrs",
        draft_logits=draft.expand(count, 1, vocabulary), coin=torch.full((count, 1), BELOW_ONE), residual=residual,
        backend="cuda",
    )  # fmt: skip
    reached = surplus.cumsum(dim=0)
    expected = torch.searchsorted(reached, residual.double() * reached[-1], right=True)
    assert torch.equal(out.bonus, expected) and (out.accepted == 0).all()


def test_values_that_the_api_refuses_are_harmless():
    good = {**arguments(random_logits(2, 4, 50), torch.zeros(2, 4, dtype=torch.int64), temperature=1.0, rule="mrs")}
    good |= {"draft_logits": random_logits(2, 4, 50, seed=1), "coin": uniform(2, 4), "residual": uniform(2)}
    operator = dispatch.operator("block_verify", "cuda")
    odd_ids = torch.tensor([[2**40, -1, 50, 3]]).expand(2, 4).clone()
    out = operator(**{**good, "draft_ids": odd_ids, "known": torch.tensor([-3, 9], dtype=torch.int32)})
    assert out[0].tolist() == [0, 0] and out[1][1].item() == -1
    assert 0 <= out[1][0].item() < 50 and torch.equal(out[2][1], odd_ids[1])
    late = operator(**{**good, "residual": torch.tensor([1.0, math.nan])})
    assert ((late[2] >= -1) & (late[2] < 50)).all()


def test_bad_input_is_refused_as_by_the_cpu_op():
    good = good_arguments()
    for name, value in unsafe(REFUSED, good):
        if name == "banned_ids" and value.dtype == torch.int64:
            continue  # values are trusted on a GPU
        said = []
        for backend in ("cpu", "cuda"):
            with pytest.raises(RuntimeError, match="block_verify: ") as refusal:
                dispatch.operator("block_verify", backend)(**{**good, name: value})
            said.append(str(refusal.value).splitlines()[0])
        assert said[0] == said[1]


def test_a_draft_that_was_drawn_by_sample_logits_is_accepted_whole():
    batch, length, vocabulary = 3, 5, 1500
    target = random_logits(batch, length, vocabulary)
    rows = batch * length
    revealed = torch.arange(rows) * 987654321
    drawn = simsd_kernels.sample_logits(
        target.flatten(0, 1), torch.full((rows,), 0.8), torch.zeros(rows, dtype=torch.int32), torch.full((rows,), 0.9),
        torch.full((rows,), 5), torch.arange(length, dtype=torch.int32).repeat(batch), revealed, backend="cuda",
    )  # fmt: skip
    out = verify(
        *(target, drawn.token.view(batch, length)), temperature=0.8, top_p=0.9, seed=5,
        revealed=revealed.view(batch, length), backend="cuda",
    )  # fmt: skip
    assert (out.accepted == length).all() and torch.equal(out.prob.flatten(), drawn.prob)
