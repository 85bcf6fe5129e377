"""What of a drafted block is committed: golden cases, plain loops, and the law of modified rejection sampling."""

import json
import math
import pathlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import simsd_kernels
from arguments import Pick, relaid
from backends import FLOATS, backends, callable_of, device_of, each_dtype, kernels
from chi_squared import assert_distributed
from logits import INF, VOCABULARIES, random_banned, random_values
from simsd_kernels import dispatch

block_verify, sample_logits = callable_of("block_verify"), callable_of("sample_logits")
ALL = -1  # every bit
GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "greedy_accept.json").read_text())["cases"]
LANES = ("target_logits", "draft_ids", "known", "drafted", "temperature", "top_k", "top_p", "seed", "position")
LANES += ("revealed", "draft_logits", "coin", "residual")
DECISIONS = ("accepted", "bonus", "tokens", "target_ids")
BELOW_ONE = 1 - 2.0**-24
CASES = {"reference": 0, "cpu": 60, "triton": 68, "cuda": 400}
many_rows = backends("reference", "cpu", "cuda")  # each is a program of its own in Triton's interpreter


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
        made["banned_ids"] = torch.tensor(rest.pop("banned"), dtype=torch.int64)
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


def random_arguments(seed: int) -> dict:
    target, draft_ids, settings = random_case(seed)
    return arguments(target, draft_ids, **settings)


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


@kernels
def test_verdicts_are_those_of_the_definition(backend, seed):
    target, draft_ids, settings = random_case(seed)
    out = verify(target, draft_ids, backend=backend, **settings)
    for other in ("reference", "cpu") if backend == "cuda" else ("reference",):
        expected = verify(target, draft_ids, backend=other, **settings)
        for name in DECISIONS:
            assert torch.equal(getattr(out, name), getattr(expected, name)), (other, name)
        torch.testing.assert_close(out.prob, expected.prob, rtol=5e-6, atol=5e-6)
    b = seed % target.shape[0]
    again = verify(target[b : b + 1], draft_ids[b : b + 1], backend=backend, **one_of(b, settings))
    assert all(torch.equal(x[b : b + 1], y) for x, y in zip(out, again, strict=True))


@pytest.mark.parametrize("number", range(len(GOLDEN)))
def test_golden_greedy_acceptance(backend, number):
    case = GOLDEN[number]
    length = len(case["draft_ids"])
    target = random_logits(1, length, 1024, seed=number)
    target[0, torch.arange(length), case["target_argmax"]] = 20.0
    out = verify(target, [case["draft_ids"]], backend=backend)
    assert out.accepted.item() == case["n_accepted"]
    assert out.bonus.item() == (-1 if case["bonus"] is None else case["bonus"])
    assert [token for token in out.tokens[0].tolist() if token >= 0] == case["accepted_ids"]
    assert out.target_ids[0].tolist() == case["target_argmax"]


def test_known_tokens_are_kept_whatever_the_target_says(backend):
    target = torch.zeros(1, 4, 10)
    target[0, :, 3] = 5.0
    out = verify(target, [[7, 999, 3, 3]], known=2, backend=backend)
    assert out.accepted.item() == 2 and out.bonus.item() == -1
    assert out.tokens.tolist() == [[7, 999, 3, 3]] and out.target_ids.tolist() == [[7, 999, 3, 3]]
    assert out.prob[0, :2].tolist() == [1.0, 1.0]
    everything = verify(target, [[7, 999, -5, 3]], known=4, backend=backend)
    assert everything.accepted.item() == 0 and everything.bonus.item() == -1
    assert everything.tokens.tolist() == [[7, 999, -5, 3]] and everything.prob.tolist() == [[1.0] * 4]


def test_positions_never_drafted_take_the_targets_token_and_are_not_counted(backend):
    target = torch.zeros(1, 4, 10)
    target[0, :, 3] = 5.0
    out = verify(target, [[3, 8, 3, 8]], drafted=0b0101, backend=backend)
    assert out.accepted.item() == 2 and out.bonus.item() == -1 and out.tokens.tolist() == [[3, 3, 3, 3]]
    stopped = verify(target, [[3, 8, 5, 8]], drafted=0b0101, backend=backend)
    assert stopped.accepted.item() == 1 and stopped.bonus.item() == 3 and stopped.tokens.tolist() == [[3, 3, 3, -1]]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_probabilities_are_the_targets_before_filtering(backend, temperature):
    target = random_logits(5, 6, 700)
    key = {"seed": 3} if temperature else {}
    plain = verify(target, torch.zeros(5, 6, dtype=torch.int64), temperature=temperature, backend=backend, **key)
    draft = plain.target_ids.clone()
    draft[:, 3] += 1  # rejected there
    out = verify(
        *(target, draft), known=1, temperature=temperature, top_k=700, top_p=1.0, banned=[699], backend=backend, **key
    )
    target[..., 699] = -INF
    p = (target.double() / (temperature or 1.0)).softmax(dim=2)
    judged = torch.where(out.tokens >= 0, out.tokens, out.target_ids)
    expected = p.gather(2, judged[:, :, None]).squeeze(2)
    expected[:, 0] = 1.0
    torch.testing.assert_close(out.prob.double(), expected, rtol=2e-6, atol=2e-6)
    assert (out.tokens[:, 4:] == -1).all() and (out.target_ids[:, 4:] >= 0).all()


def test_probability_of_the_drafted_token_under_mrs(backend):
    target = random_logits(4, 3, 50)
    draft_ids = torch.tensor([[1, 2, 3]])
    out = verify(
        *(target, draft_ids), temperature=0.8, top_k=40, rule="mrs", draft_logits=target.clone(),
        coin=uniform(4, 3), residual=uniform(4), backend=backend,
    )  # fmt: skip
    assert (out.accepted == 3).all() or (out.bonus >= 0).any()
    judged = torch.where(out.tokens >= 0, out.tokens, out.target_ids)
    expected = (target.double() / 0.8).softmax(dim=2).gather(2, judged[:, :, None]).squeeze(2)
    torch.testing.assert_close(out.prob.double(), expected, rtol=2e-6, atol=2e-6)


def test_match_at_temperature_draws_as_sample_logits_does(backend):
    batch, length, vocabulary = 3, 5, 321
    target = random_logits(batch, length, vocabulary)
    seed, position = torch.tensor([1, 2, -3]), torch.arange(40, 40 + length).expand(batch, length)
    revealed = torch.arange(batch * length).view(batch, length) * 12345678901
    top_k, top_p, temperature = torch.tensor([0, 5, 0]), torch.tensor([1.0, 1.0, 0.8]), torch.tensor([0.9, 1.3, 0.5])
    rows = lambda value, dtype: value.to(dtype).repeat_interleave(length)  # noqa: E731
    drawn = sample_logits(
        target.flatten(0, 1),
        rows(temperature, torch.float32),
        rows(top_k, torch.int32),
        rows(top_p, torch.float32),
        rows(seed, torch.int64),
        position.flatten().int(),
        revealed.flatten(),
        torch.tensor([0, 7]),
        backend=backend,
    )
    expected = drawn.token.view(batch, length)
    draft = expected.clone()
    draft[1, 2] += 1
    out = verify(
        *(target, draft), temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, position=position,
        revealed=revealed, banned=[0, 7], backend=backend,
    )  # fmt: skip
    assert torch.equal(out.target_ids, expected)
    assert out.accepted.tolist() == [5, 2, 5] and out.bonus.tolist() == [-1, expected[1, 2].item(), -1]
    torch.testing.assert_close(out.prob, drawn.prob.view(batch, length), rtol=1e-6, atol=1e-6)


@many_rows
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_match_walks_as_the_plain_loop_does(backend, data):
    batch, length, vocabulary = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 6)), 3
    target = random_logits(batch, length, vocabulary, seed=data.draw(st.integers(0, 50)))
    if data.draw(st.booleans()):
        target = target.round()  # ties
    draft = data.draw(st.lists(st.integers(0, 2), min_size=batch * length, max_size=batch * length))
    draft = torch.tensor(draft, dtype=torch.int64).view(batch, length)
    known = torch.tensor([data.draw(st.integers(0, length)) for _ in range(batch)])
    drafted = torch.tensor([data.draw(st.integers(0, 63)) for _ in range(batch)])
    out = verify(target, draft, known=known, drafted=drafted, backend=backend)
    for b in range(batch):
        best = [int((row == row.max()).nonzero()[0]) for row in target[b]]
        accepted, bonus, tokens = walk(
            draft[b].tolist(), best, int(known[b]), drafted[b], lambda i, b=b, best=best: draft[b, i] == best[i]
        )
        assert (out.accepted[b], out.bonus[b], out.tokens[b].tolist()) == (accepted, bonus, tokens)


def filtered_softmax(logits, temperature, top_k, top_p):
    x = logits.double() / temperature
    ids = sorted(range(len(x)), key=lambda i: (-float(x[i]), i))
    if 0 < top_k < len(ids):
        ids = [i for i in ids if x[i] >= x[ids[top_k - 1]]]
    p = torch.zeros_like(x)
    p[ids] = x[ids].softmax(dim=0)
    if top_p < 1:
        kept, mass = [], 0.0
        for i in ids:
            if kept and mass >= top_p:
                break
            kept.append(i)
            mass += float(p[i])
        p = torch.where(torch.isin(torch.arange(len(x)), torch.tensor(kept)), p, 0.0)
    return p / p.sum()


@many_rows
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.7), (6, 0.9)])
def test_mrs_decides_as_the_plain_loop_does(backend, top_k, top_p):
    batch, length, vocabulary = 60, 4, 12
    target = random_logits(batch, length, vocabulary, seed=1)
    draft = target + random_logits(batch, length, vocabulary, seed=2, scale=1.0)
    draft_ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(3))
    draft_ids = torch.where(uniform(batch, length, seed=6) < 0.7, target.argmax(dim=2), draft_ids)
    coin, residual = uniform(batch, length, seed=4), uniform(batch, seed=5)
    known, drafted = torch.arange(batch) % 3, torch.arange(batch) % 16 | 8
    out = verify(
        *(target, draft_ids), known=known, drafted=drafted, temperature=0.8, top_k=top_k, top_p=top_p, rule="mrs",
        draft_logits=draft, coin=coin, residual=residual, backend=backend,
    )  # fmt: skip
    seen = set()
    for b in range(batch):
        p = [filtered_softmax(row, 0.8, top_k, top_p) for row in target[b]]
        q = [filtered_softmax(row, 0.8, top_k, top_p) for row in draft[b]]

        def accepts(i, b=b, p=p, q=q):
            x = draft_ids[b, i]
            return bool(coin[b, i] * q[i][x] < p[i][x])

        best = target[b].argmax(dim=1).tolist()
        accepted, bonus, tokens = walk(draft_ids[b].tolist(), best, int(known[b]), drafted[b], accepts)
        if bonus >= 0:
            stop = max(i for i in range(length) if tokens[i] >= 0)
            surplus = (p[stop] - q[stop]).clamp(min=0)
            surplus = surplus if surplus.any() else p[stop]
            reached = surplus.cumsum(dim=0)
            bonus = int((reached > residual[b].double() * reached[-1]).nonzero()[0])
            tokens[stop] = bonus
        assert (out.accepted[b], out.bonus[b], out.tokens[b].tolist()) == (accepted, bonus, tokens), b
        assert out.target_ids[b, known[b] :].tolist() == best[known[b] :]
        seen.add((accepted, bonus >= 0))
    assert len(seen) >= 4


@many_rows
@pytest.mark.parametrize(
    "top_k, top_p, banned", [(0, 1.0, None), (6, 1.0, None), (0, 0.8, None), (9, 0.9, None), (0, 1.0, [2, 5])]
)
def test_mrs_emits_the_targets_law_for_one_row(backend, top_k, top_p, banned):
    count, vocabulary, temperature = 20_000, 14, 0.9
    target, draft = random_logits(vocabulary, seed=11), random_logits(vocabulary, seed=12)
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    allowed[banned or []] = False
    p, q = (
        filtered_softmax(logits.masked_fill(~allowed, -INF), temperature, top_k, top_p) for logits in (target, draft)
    )
    drawn = torch.multinomial(q, count, replacement=True, generator=torch.Generator().manual_seed(13))
    out = verify(
        target.expand(count, 1, vocabulary),
        drawn[:, None],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        rule="mrs",
        draft_logits=draft.expand(count, 1, vocabulary),
        coin=uniform(count, 1, seed=14),
        residual=uniform(count, seed=15),
        backend=backend,
        **({"banned": banned} if banned else {}),
    )
    assert_distributed(out.tokens[:, 0], p)
    rate = float(torch.minimum(p, q).sum())
    assert float(out.accepted.double().mean()) == pytest.approx(rate, abs=4.5 * (rate * (1 - rate) / count) ** 0.5)


def test_mrs_accepts_everything_from_the_targets_own_twin(backend):
    target = random_logits(8, 4, 2000)
    draft_ids = torch.randint(2000, (8, 4), generator=torch.Generator().manual_seed(0))
    coin = torch.full((8, 4), 1 - 2**-24)
    out = verify(
        *(target, draft_ids), temperature=1.0, rule="mrs", draft_logits=target.clone(), coin=coin,
        residual=uniform(8), backend=backend,
    )  # fmt: skip
    assert (out.accepted == 4).all() and (out.bonus == -1).all() and torch.equal(out.tokens, draft_ids)


def test_mrs_token_that_both_filter_out_is_rejected_and_drawn_from_the_target(backend):
    target = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]])
    draws = []
    for residual in (0.0, 0.5, 0.8, 0.999):
        out = verify(
            *(target, [[3]]), temperature=1.0, top_k=2, rule="mrs", draft_logits=target.clone(),
            coin=torch.zeros(1, 1), residual=torch.tensor([residual]), backend=backend,
        )  # fmt: skip
        assert out.accepted.item() == 0
        draws.append(out.bonus.item())
    assert draws == [0, 0, 1, 1]  # p = (.731, .269)


def test_mrs_at_temperature_zero_is_match(backend):
    target = random_logits(6, 4, 30)
    draft_ids = target.argmax(dim=2)
    draft_ids[::2, 1] = (draft_ids[::2, 1] + 1) % 30
    greedy = verify(target, draft_ids, backend=backend)
    out = verify(
        *(target, draft_ids), rule="mrs", draft_logits=random_logits(6, 4, 30, seed=1), coin=uniform(6, 4),
        residual=uniform(6), backend=backend,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(greedy, out, strict=True))


def test_garbage_where_nothing_was_drafted_does_not_matter(backend):
    target, draft = random_logits(3, 4, 40), random_logits(3, 4, 40, seed=1)
    coin, residual = uniform(3, 4), uniform(3)
    draft_ids = draft.argmax(dim=2)
    settings = {"known": 1, "drafted": 0b1010, "temperature": 1.0, "rule": "mrs", "coin": coin, "residual": residual}
    clean = verify(target, draft_ids, draft_logits=draft, backend=backend, **settings)
    poisoned_ids, poisoned = draft_ids.clone(), draft.clone()
    poisoned_ids[:, 2], poisoned[:, 2], poisoned[:, 0] = -9, math.nan, math.nan
    again = verify(target, poisoned_ids, draft_logits=poisoned, backend=backend, **settings)
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


def test_row_with_nothing_finite_takes_the_lowest_allowed_id(backend):
    target = torch.full((1, 2, 20), math.nan)
    out = verify(target, [[1, 5]], banned=[0], backend=backend)
    assert out.accepted.item() == 1 and out.bonus.item() == 1 and out.prob.tolist() == [[0.0, 0.0]]
    drawn = verify(
        *(target, [[5, 5]]), temperature=1.0, rule="mrs", draft_logits=torch.zeros(1, 2, 20), coin=torch.zeros(1, 2),
        residual=torch.zeros(1), banned=[0], backend=backend,
    )  # fmt: skip
    assert drawn.accepted.item() == 0 and drawn.bonus.item() == 1


@backends("cpu", "cuda")
@each_dtype
@pytest.mark.parametrize("rule", ["match", "mrs"])
@pytest.mark.parametrize("batch, length, vocabulary", [(5, 7, 3), (4, 4, 130), (3, 64, 515), (1, 2, 151936)])
@pytest.mark.parametrize("top_k, top_p", [(None, None), (20, 0.9)])
def test_same_verdicts_as_the_reference(backend, dtype, rule, batch, length, vocabulary, top_k, top_p):
    target = random_logits(batch, length, vocabulary, seed=vocabulary, scale=4.0).to(dtype)
    draft = (target + random_logits(batch, length, vocabulary, seed=5, scale=0.5)).to(dtype)
    given = {
        "known": torch.arange(batch) % 2,
        "drafted": ~(torch.arange(batch) % 5),
        "temperature": (torch.arange(batch) % 3 * 0.5 + 0.5) * (torch.arange(batch) % 4 < 3),
        "top_k": top_k,
        "top_p": top_p,
        "rule": rule,
        "banned": [1],
        "draft_logits": draft,
        "coin": uniform(batch, length),
        "residual": uniform(batch),
    }
    if rule == "match":
        given |= {"seed": 5, "revealed": 3}
    draft_ids = verify(target, torch.zeros(batch, length, dtype=torch.int64), backend="reference", **given).target_ids
    draft_ids = torch.where(uniform(batch, length, seed=9) < 0.8, draft_ids, (draft_ids + 1) % vocabulary)
    expected = verify(target, draft_ids, backend="reference", **given)
    out = verify(target, draft_ids, backend=backend, **given)
    for name in DECISIONS:
        assert torch.equal(getattr(out, name), getattr(expected, name)), name
    torch.testing.assert_close(out.prob, expected.prob, rtol=5e-6, atol=5e-6)


def test_result_does_not_depend_on_batch_strides_or_threads(backend, threads):
    target, draft = random_logits(6, 5, 300), random_logits(6, 5, 300, seed=1)
    draft_ids = target.argmax(dim=2)
    settings = {"temperature": 1.0, "rule": "mrs", "coin": uniform(6, 5), "residual": uniform(6), "top_k": 30}
    whole = verify(target, draft_ids, draft_logits=draft, backend=backend, **settings)
    strided = torch.empty(5, 300, 12)[:, :, ::2].permute(2, 0, 1).copy_(target)
    threads(1)
    again = verify(strided, draft_ids, draft_logits=draft, backend=backend, **settings)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for b in range(6):
        one = {name: value[b : b + 1] if torch.is_tensor(value) else value for name, value in settings.items()}
        alone = verify(target[b : b + 1], draft_ids[b : b + 1], draft_logits=draft[b : b + 1], backend=backend, **one)
        for name in DECISIONS:
            assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[b]), name


@pytest.mark.parametrize("rule", ["match", "mrs"])
@pytest.mark.parametrize("batch, length", [(0, 4), (3, 0), (0, 0)])
def test_empty_batches_and_blocks_are_fine(backend, rule, batch, length):
    target = torch.zeros(batch, length, 9)
    extra = {"draft_logits": target, "coin": torch.zeros(batch, length), "residual": torch.zeros(batch)}
    out = verify(
        *(target, torch.zeros(batch, length, dtype=torch.int64)), rule=rule, backend=backend,
        **(extra if rule == "mrs" else {}),
    )  # fmt: skip
    assert out.accepted.tolist() == [0] * batch and out.bonus.tolist() == [-1] * batch
    assert out.tokens.shape == out.target_ids.shape == out.prob.shape == (batch, length)
    assert [value.dtype for value in out] == [torch.int32, *[torch.int64] * 3, torch.float32]


def good_arguments(rule="mrs"):
    """Two blocks of four over nine ids."""
    made = arguments(
        *(torch.zeros(2, 4, 9), torch.zeros(2, 4, dtype=torch.int64)),
        temperature=1.0, top_k=0, top_p=1.0, seed=0, rule=rule, banned=[8],
    )  # fmt: skip
    return {
        **made,
        "draft_logits": torch.zeros(2, 4, 9),
        "coin": torch.zeros(2, 4),
        "residual": torch.zeros(2),
    }


REFUSED = [
    ("target_logits", torch.zeros(2, 4), ValueError, r"target_logits must be \[B, L, V\].*got \[2, 4\]"),
    ("target_logits", torch.zeros(2, 65, 9), ValueError, "L must be at most 64, got 65"),
    ("target_logits", torch.zeros(2, 4, 0), ValueError, "at least one vocabulary entry"),
    ("target_logits", torch.zeros(2, 4, 9, dtype=torch.int32), TypeError, "target_logits must be .*got torch.int32"),
    ("draft_ids", torch.zeros(2, 3, dtype=torch.int64), ValueError, r"draft_ids must be \[B, L\] = \[2, 4\]"),
    ("draft_ids", torch.zeros(2, 4, dtype=torch.int32), TypeError, "draft_ids must be torch.int64"),
    ("draft_ids", torch.full((2, 4), 9), ValueError, r"draft_ids must be in \[0, 9\) where drafted, got 9"),
    ("known", torch.tensor([0, 5], dtype=torch.int32), ValueError, r"known must be in \[0, 4\], got 5"),
    ("known", torch.tensor([0, -1], dtype=torch.int32), ValueError, r"known must be in \[0, 4\], got -1"),
    ("known", torch.zeros(2, dtype=torch.int64), TypeError, "known must be torch.int32"),
    ("drafted", torch.zeros(2, 4, dtype=torch.bool), ValueError, r"drafted must be \[B\]"),
    ("temperature", torch.full((2,), -1.0), ValueError, "temperature must be finite and >= 0, got -1.0"),
    ("temperature", 1.0, TypeError, "temperature must be a tensor, got float"),
    ("top_k", torch.full((2,), -1, dtype=torch.int32), ValueError, "top_k must be >= 0"),
    ("top_p", torch.full((2,), 1.5), ValueError, r"top_p must be in \[0, 1\]"),
    ("seed", torch.zeros(2), TypeError, "seed must be torch.int64, got torch.float32"),
    ("position", torch.zeros(2, dtype=torch.int32), ValueError, r"position must be \[B, L\]"),
    ("revealed", torch.zeros(2, 4, dtype=torch.int32), TypeError, "revealed must be torch.int64"),
    (
        "draft_logits",
        torch.zeros(2, 4, 8),
        ValueError,
        r"draft_logits must be \[B, L, V\] = \[2, 4, 9\], got \[2, 4, 8\]",
    ),
    ("draft_logits", None, ValueError, "rule 'mrs' needs .*missing: draft_logits"),
    ("coin", None, ValueError, "missing: coin"),
    ("coin", torch.ones(2, 4), ValueError, r"coin must be in \[0, 1\), got 1.0"),
    ("residual", None, ValueError, "missing: residual"),
    ("residual", torch.tensor([0.5, -0.1]), ValueError, r"residual must be in \[0, 1\), got -0.1"),
    ("banned_ids", torch.tensor([9]), ValueError, r"banned_ids must be in \[0, 9\), got 9"),
    ("rule", "exact", ValueError, "rule must be one of match, mrs, got 'exact'"),
    ("coin", torch.zeros(2, 4, device="meta"), ValueError, "one device.*coin on meta"),
]


@pytest.mark.parametrize("missing", ["seed", "position", "revealed"])
def test_match_refuses_half_a_noise_key(missing):
    with pytest.raises(ValueError, match=f"seed, position and revealed go together, but {missing} is missing"):
        simsd_kernels.block_verify(**{**good_arguments("match"), missing: None})


def test_match_at_temperature_needs_the_noise_key():
    given = {**good_arguments("match"), "seed": None, "position": None, "revealed": None}
    with pytest.raises(ValueError, match="temperature must be 0 for rule 'match' without seed, .*got 1.0"):
        simsd_kernels.block_verify(**given)
    given["temperature"] = torch.zeros(2)
    simsd_kernels.block_verify(**given)


@pytest.mark.parametrize("rule", ["match", "mrs"])
def test_opcheck(rule):
    torch.library.opcheck(torch.ops.simsd.block_verify.default, (), good_arguments(rule))


@kernels
def test_float64_is_refused_by_name(backend):
    with pytest.raises(RuntimeError, match=f"{backend}: supports float32, .*got target_logits of torch.float64"):
        verify(torch.zeros(1, 1, 3).double(), torch.zeros(1, 1, dtype=torch.int64), backend=backend)


def test_filters_judge_both_sides_of_mrs(backend):
    """top_k = 2 leaves p on ids 0, 1 and q on ids 1, 2: a draft of 2 is rejected, and 0 or 1 takes its place."""
    p = torch.tensor([0.5, 0.3, 0.2]).log().expand(4, 1, 3)
    q = torch.tensor([0.1, 0.5, 0.4]).log().expand(4, 1, 3)
    out = verify(
        p, torch.tensor([[2], [1], [1], [2]]), temperature=1.0, rule="mrs", draft_logits=q, top_k=2,
        coin=torch.tensor([[0.0], [0.67], [0.68], [0.99]]), residual=torch.full((4,), 0.999), backend=backend,
    )  # fmt: skip
    # p = (5, 3, 0) / 8, q = (0, 5, 4) / 9: p(1) / q(1) = 0.675, and the surplus is all on id 0
    assert out.accepted.tolist() == [0, 1, 0, 0] and out.bonus.tolist() == [0, -1, 0, 0]
    torch.testing.assert_close(out.prob[:, 0], torch.tensor([0.5, 0.3, 0.5, 0.5]))


def test_filters_do_not_touch_greedy_verification(backend):
    target = random_logits(2, 3, 40)
    draft_ids = torch.where(uniform(2, 3) < 0.7, target.argmax(dim=2), 7)
    plain = verify(target, draft_ids, backend=backend)
    assert all(map(torch.equal, verify(target, draft_ids, top_k=1, top_p=0.0, backend=backend), plain))


def test_residual_draw_visits_every_surplus_token_in_its_share(backend):
    """One block per residual value: the drawn ids are those of the inverse CDF of max(p - q, 0), ids ascending."""
    p = torch.tensor([0.1, 0.4, 0.1, 0.1, 0.3]).log()
    q = torch.tensor([0.5, 0.1, 0.2, 0.1, 0.1]).log()  # surplus: 0, .3, 0, 0, .2
    draws = torch.tensor([0.0, 0.3, 0.59, 0.61, 0.999])
    out = verify(
        p.expand(5, 1, 5), torch.zeros(5, 1, dtype=torch.int64), temperature=1.0, rule="mrs",
        draft_logits=q.expand(5, 1, 5), coin=torch.full((5, 1), 0.9), residual=draws, backend=backend,
    )  # fmt: skip
    assert out.bonus.tolist() == [1, 1, 1, 4, 4]
    torch.testing.assert_close(out.prob[:, 0], torch.tensor([0.4, 0.4, 0.4, 0.3, 0.3]))


def test_without_surplus_the_rejected_position_is_drawn_from_the_target(backend):
    """p = q, and a drafted id that both rule out: it is rejected, and max(p - q, 0) is empty."""
    p = torch.tensor([0.25, 0.5, 0.0, 0.25]).log().expand(4, 1, 4)
    out = verify(
        p, torch.full((4, 1), 2), temperature=1.0, rule="mrs", draft_logits=p, coin=torch.zeros(4, 1),
        residual=torch.tensor([0.0, 0.3, 0.74, 0.76]), backend=backend,
    )  # fmt: skip
    assert out.bonus.tolist() == [0, 1, 1, 3] and out.accepted.tolist() == [0] * 4


def test_ties_between_pieces_of_a_long_row_go_to_the_lowest_id(backend):
    target = torch.zeros(1, 2, 18 * 4096)
    target[0, 0, [4095, 4096, 17 * 4096]] = 1.0
    target[0, 1, [16 * 4096 + 3, 17 * 4096]] = 1.0
    out = verify(target, torch.zeros(1, 2, dtype=torch.int64), drafted=0, backend=backend)
    assert out.target_ids.tolist() == [[4095, 16 * 4096 + 3]]


@kernels
def test_a_long_row_is_judged_as_by_the_reference(backend):
    target, draft_ids = random_logits(1, 2, 20 * 4096 + 1), torch.tensor([[5, 20 * 4096]])
    out, expected = (verify(target, draft_ids, backend=name) for name in (backend, "reference"))
    assert all(torch.equal(getattr(out, name), getattr(expected, name)) for name in DECISIONS)
    torch.testing.assert_close(out.prob, expected.prob, rtol=2e-6, atol=2e-7)


@many_rows
@pytest.mark.parametrize("dtypes", [(a, b) for a in FLOATS for b in FLOATS], ids=str)
def test_residual_draw_is_the_inverse_of_the_cumulative_surplus(backend, dtypes):
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
        backend=backend,
    )  # fmt: skip
    reached = surplus.cumsum(dim=0)
    expected = torch.searchsorted(reached, residual.double() * reached[-1], right=True)
    assert torch.equal(out.bonus, expected) and (out.accepted == 0).all()


def test_a_draft_that_was_drawn_by_sample_logits_is_accepted_whole(backend):
    batch, length, vocabulary = 3, 5, 1500
    target = random_logits(batch, length, vocabulary)
    rows = batch * length
    revealed = torch.arange(rows) * 987654321
    drawn = sample_logits(
        target.flatten(0, 1), torch.full((rows,), 0.8), torch.zeros(rows, dtype=torch.int32), torch.full((rows,), 0.9),
        torch.full((rows,), 5), torch.arange(length, dtype=torch.int32).repeat(batch), revealed, backend=backend,
    )  # fmt: skip
    out = verify(
        *(target, drawn.token.view(batch, length)), temperature=0.8, top_p=0.9, seed=5,
        revealed=revealed.view(batch, length), backend=backend,
    )  # fmt: skip
    assert (out.accepted == length).all()
    torch.testing.assert_close(out.prob.flatten(), drawn.prob, rtol=2e-6, atol=0)
    assert backend != "cuda" or torch.equal(out.prob.flatten(), drawn.prob)


@backends("cuda")
def test_values_that_the_api_refuses_are_harmless(backend):
    good = {**arguments(random_logits(2, 4, 50), torch.zeros(2, 4, dtype=torch.int64), temperature=1.0, rule="mrs")}
    good |= {"draft_logits": random_logits(2, 4, 50, seed=1), "coin": uniform(2, 4), "residual": uniform(2)}
    operator, device = dispatch.operator("block_verify", backend), device_of(backend)

    def call(**changes):
        given = {name: x.to(device) if torch.is_tensor(x) else x for name, x in {**good, **changes}.items()}
        return [x.cpu() for x in operator(**given)]

    odd_ids = torch.tensor([[2**40, -1, 50, 3]]).expand(2, 4).clone()
    out = call(draft_ids=odd_ids, known=torch.tensor([-3, 9], dtype=torch.int32))
    assert out[0].tolist() == [0, 0] and out[1][1].item() == -1
    assert 0 <= out[1][0].item() < 50 and torch.equal(out[2][1], odd_ids[1])
    late = call(residual=torch.tensor([1.0, math.nan]))
    assert ((late[2] >= -1) & (late[2] < 50)).all()


@backends("emulation")
def test_known_rows_are_not_read_nor_draft_rows_that_were_not_drafted(counted):
    batch, length, vocabulary = 2, 4, 2048
    target, draft = random_logits(batch, length, vocabulary), random_logits(batch, length, vocabulary, seed=1)
    draft_ids, coin = target.argmax(dim=2), torch.zeros(batch, length)  # a coin of 0 accepts
    settings = {"temperature": 1.0, "rule": "mrs", "coin": coin, "residual": uniform(batch), "draft_logits": draft}
    settings |= {"known": torch.tensor([1, 3]), "drafted": 0b0110}
    drawn = counted(lambda: verify(target, draft_ids, backend="cuda", **settings))
    assert drawn["loaded_bytes"] == (3 + 1 + 2 + 0) * vocabulary * 4
    greedy = counted(lambda: verify(target, draft_ids, known=1, backend="cuda"))
    assert greedy["loaded_bytes"] == 2 * 3 * vocabulary * 4
