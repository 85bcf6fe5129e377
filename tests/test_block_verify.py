"""What of a drafted block is committed: golden cases, plain loops, and the law of modified rejection sampling."""

import json
import math
import pathlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import simsd_kernels
from backends import needs_compiled_ops, on_each_backend, unsafe
from chi_squared import assert_distributed

INF = math.inf
ALL = -1  # every bit
GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "greedy_accept.json").read_text())["cases"]
each_backend = on_each_backend("block_verify")
each_other_backend = on_each_backend("block_verify", but="reference")


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
    return simsd_kernels.block_verify(**arguments(target, draft_ids, **settings), backend=backend)


def random_logits(*shape, seed=0, scale=2.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


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


@each_backend
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


@each_backend
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


@each_backend
def test_positions_never_drafted_take_the_targets_token_and_are_not_counted(backend):
    target = torch.zeros(1, 4, 10)
    target[0, :, 3] = 5.0
    out = verify(target, [[3, 8, 3, 8]], drafted=0b0101, backend=backend)
    assert out.accepted.item() == 2 and out.bonus.item() == -1 and out.tokens.tolist() == [[3, 3, 3, 3]]
    stopped = verify(target, [[3, 8, 5, 8]], drafted=0b0101, backend=backend)
    assert stopped.accepted.item() == 1 and stopped.bonus.item() == 3 and stopped.tokens.tolist() == [[3, 3, 3, -1]]


@each_backend
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


@each_backend
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


@each_backend
def test_match_at_temperature_draws_as_sample_logits_does(backend):
    batch, length, vocabulary = 3, 5, 321
    target = random_logits(batch, length, vocabulary)
    seed, position = torch.tensor([1, 2, -3]), torch.arange(40, 40 + length).expand(batch, length)
    revealed = torch.arange(batch * length).view(batch, length) * 12345678901
    top_k, top_p, temperature = torch.tensor([0, 5, 0]), torch.tensor([1.0, 1.0, 0.8]), torch.tensor([0.9, 1.3, 0.5])
    rows = lambda value, dtype: value.to(dtype).repeat_interleave(length)  # noqa: E731
    drawn = simsd_kernels.sample_logits(
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


@each_backend
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


@each_backend
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


@each_backend
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


@each_backend
def test_mrs_accepts_everything_from_the_targets_own_twin(backend):
    target = random_logits(8, 4, 2000)
    draft_ids = torch.randint(2000, (8, 4), generator=torch.Generator().manual_seed(0))
    coin = torch.full((8, 4), 1 - 2**-24)
    out = verify(
        *(target, draft_ids), temperature=1.0, rule="mrs", draft_logits=target.clone(), coin=coin,
        residual=uniform(8), backend=backend,
    )  # fmt: skip
    assert (out.accepted == 4).all() and (out.bonus == -1).all() and torch.equal(out.tokens, draft_ids)


@each_backend
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


@each_backend
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


@each_backend
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


@each_backend
def test_row_with_nothing_finite_takes_the_lowest_allowed_id(backend):
    target = torch.full((1, 2, 20), math.nan)
    out = verify(target, [[1, 5]], banned=[0], backend=backend)
    assert out.accepted.item() == 1 and out.bonus.item() == 1 and out.prob.tolist() == [[0.0, 0.0]]
    drawn = verify(
        *(target, [[5, 5]]), temperature=1.0, rule="mrs", draft_logits=torch.zeros(1, 2, 20), coin=torch.zeros(1, 2),
        residual=torch.zeros(1), banned=[0], backend=backend,
    )  # fmt: skip
    assert drawn.accepted.item() == 0 and drawn.bonus.item() == 1


@each_other_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
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
    for name in ("accepted", "bonus", "tokens", "target_ids"):
        assert torch.equal(getattr(out, name), getattr(expected, name)), name
    torch.testing.assert_close(out.prob, expected.prob, rtol=5e-6, atol=5e-6)


@each_backend
def test_result_does_not_depend_on_batch_strides_or_threads(backend):
    target, draft = random_logits(6, 5, 300), random_logits(6, 5, 300, seed=1)
    draft_ids = target.argmax(dim=2)
    settings = {"temperature": 1.0, "rule": "mrs", "coin": uniform(6, 5), "residual": uniform(6), "top_k": 30}
    whole = verify(target, draft_ids, draft_logits=draft, backend=backend, **settings)
    strided = torch.empty(5, 300, 12)[:, :, ::2].permute(2, 0, 1).copy_(target)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = verify(strided, draft_ids, draft_logits=draft.half().float(), backend=backend, **settings)
        again = verify(strided, draft_ids, draft_logits=draft, backend=backend, **settings)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for b in range(6):
        one = {name: value[b : b + 1] if torch.is_tensor(value) else value for name, value in settings.items()}
        alone = verify(target[b : b + 1], draft_ids[b : b + 1], draft_logits=draft[b : b + 1], backend=backend, **one)
        for name in ("accepted", "bonus", "tokens", "target_ids"):
            assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[b]), name


@each_backend
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


@pytest.mark.parametrize("name, value, error, message", REFUSED)
def test_bad_input_is_refused_by_name(name, value, error, message):
    with pytest.raises(error, match=message):
        simsd_kernels.block_verify(**{**good_arguments(), name: value})


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


@needs_compiled_ops
def test_compiled_op_checks_shapes_and_dtypes_itself():
    good = good_arguments()
    for name, value in unsafe(REFUSED, good):
        with pytest.raises(RuntimeError, match="block_verify: "):
            torch.ops.simsd.block_verify(**{**good, name: value})


@pytest.mark.parametrize("rule", ["match", "mrs"])
def test_opcheck(rule):
    torch.library.opcheck(torch.ops.simsd.block_verify.default, (), good_arguments(rule))


@each_backend
@pytest.mark.parametrize("rule", ["mrs"])
def test_compiles_into_a_larger_graph(backend, rule):
    given = {**good_arguments(rule), "target_logits": random_logits(2, 4, 9)}

    def step(target_logits, rest):
        return simsd_kernels.block_verify(target_logits * 2, **rest, backend=backend).tokens + 1

    rest = {name: value for name, value in given.items() if name != "target_logits"}
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(given["target_logits"], rest), step(given["target_logits"], rest))
