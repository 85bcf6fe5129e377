"""Which token is drawn: the law, its filters, its ties, and the noise that decides."""

from __future__ import annotations

import json
import math
import pathlib

import pytest
import torch

from arguments import Pick
from backends import backends, compiled, each_dtype, sized
from chi_squared import assert_distributed
from logits import INF, random_logits, sample
from simsd_kernels import noise

OP = "sample_logits"
many_rows = backends("reference", "cpu", "cuda")  # each is a program of its own in Triton's interpreter

KEYED = json.loads((pathlib.Path(__file__).parents[1] / "golden_noise.json").read_text())["cases"]


@each_dtype
@pytest.mark.parametrize("value", [-INF, -3.4e38, -65504.0, 0.0, 65504.0, 3.4e38, INF], ids=str)
def test_equal_logits_of_any_size_are_equally_likely(backend, dtype, value):
    largest = torch.finfo(dtype).max
    finite = max(-largest, min(value, largest))
    rows = [[finite if value < 0 else value] * 7, [-INF, math.nan, finite, *[-INF] * 3, finite]]
    out = sample(torch.tensor(rows, dtype=dtype), temperature=0.0, backend=backend)
    close = {"rtol": 1e-6, "atol": 1e-6}
    assert out.token.tolist() == [0, 2]
    torch.testing.assert_close(out.log_odds, torch.tensor([-math.log(6), 0.0]), **close)
    torch.testing.assert_close(out.prob, torch.tensor([1 / 7, 1 / 2]), **close)
    torch.testing.assert_close(out.entropy, torch.tensor([math.log(7), math.log(2)]), **close)


def test_ties_go_to_the_lowest_id(backend):
    logits = torch.zeros(3, 1500)
    logits[1, [700, 900, 1400]] = 4.0
    logits[2, [511, 512]] = 4.0
    assert sample(logits, temperature=0.0, backend=backend).token.tolist() == [0, 700, 511]


@many_rows
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_softmax_at_temperature(backend, temperature):
    logits = random_logits(1, 40, scale=2.0)
    draws = sample(logits.expand(20_000, 40), temperature=temperature, seed=3, backend=backend).token
    assert_distributed(draws, (logits[0].double() / temperature).softmax(dim=0))


@many_rows
@pytest.mark.parametrize("key", ["seed", "position", "revealed"])
def test_draws_are_independent_over_each_part_of_the_key(backend, key):
    logits = random_logits(1, 12, scale=1.0)
    count = torch.arange(10_000)
    parts = {"seed": torch.tensor(1), "position": torch.tensor(0), "revealed": torch.tensor(0), key: count}
    draws = sample(logits.expand(10_000, 12), backend=backend, **parts).token
    p = logits[0].double().softmax(dim=0)
    assert_distributed(draws, p)
    assert_distributed(draws[:-1] * 12 + draws[1:], (p[:, None] * p).flatten())


def kept_by_definition(x, top_k, top_p):
    """The ids that top-k and then top-p keep, from the definition, one row in float64."""
    x = x.double()
    ids = sorted(range(len(x)), key=lambda i: (-float(x[i]), i))
    if 0 < top_k < len(ids):
        ids = [i for i in ids if x[i] >= x[ids[top_k - 1]]]
    if top_p >= 1:
        return set(ids)
    p = x[ids].softmax(dim=0).tolist()
    kept, mass = set(), 0.0
    for i, weight in zip(ids, p, strict=True):
        if kept and mass >= top_p:
            break
        kept.add(i)
        mass += weight
    return kept


@many_rows
@pytest.mark.parametrize("top_k, top_p", [(5, 1.0), (0, 0.7), (8, 0.8), (1, 0.5), (0, 0.0), (100, 0.999)])
def test_draws_follow_the_filtered_softmax(backend, top_k, top_p):
    logits = random_logits(1, 30, seed=4, scale=1.5)
    draws = sample(logits.expand(8000, 30), top_k=top_k, top_p=top_p, seed=17, backend=backend).token
    x = torch.full((30,), -INF, dtype=torch.float64)
    kept = sorted(kept_by_definition(logits[0], top_k, top_p))
    x[kept] = logits[0, kept].double()
    assert_distributed(draws, x.softmax(dim=0))
    assert set(draws.tolist()) <= set(kept)


def logprob_by_definition(x, token, top_k, top_p):
    """log softmax of one row over the ids that the filters keep, in float64."""
    kept = sorted(kept_by_definition(x, top_k, top_p))
    return x.double()[token] - x.double()[kept].logsumexp(dim=0)


@each_dtype
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.7), (8, 0.8), (500, 0.3), (2, 0.999), (700, 1.0)])
def test_draw_logprob_is_of_softmax_over_what_the_filters_keep(backend, dtype, temperature, top_k, top_p):
    logits = random_logits(sized(12, interpreted=3), 700, seed=top_k, scale=1.5, dtype=dtype)
    out = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=11, backend=backend)
    heat = float(torch.tensor(temperature))
    expected = [
        logprob_by_definition(row.float() / heat, int(token), top_k, top_p)
        for row, token in zip(logits, out.token, strict=True)
    ]
    torch.testing.assert_close(out.draw_logprob.double(), torch.stack(expected), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (300, 1.0), (0, 0.9), (9000, 0.4)])
def test_draw_logprob_of_a_long_row_adds_up_all_its_pieces(backend, top_k, top_p):
    logits = random_logits(1, 3 * 4096 + 5, seed=2, scale=1.0)
    out = sample(logits, top_k=top_k, top_p=top_p, seed=1, backend=backend)
    ordered = logits[0].double().sort(descending=True).values
    if top_k:
        ordered = ordered[:top_k]
    if top_p < 1:
        reached = ordered.softmax(dim=0).cumsum(dim=0)
        ordered = ordered[: int((reached < float(torch.tensor(top_p))).sum()) + 1]
    expected = logits[0, out.token].double() - ordered.logsumexp(dim=0)
    torch.testing.assert_close(out.draw_logprob.double(), expected, rtol=2e-6, atol=2e-6)


def test_draw_logprob_counts_ties_with_the_kth_and_the_id_that_crosses(backend):
    rows = torch.tensor([[3.0, 2.0, 2.0, 1.0, 2.0, 0.0], [*torch.tensor([0.4, 0.2, 0.2, 0.2]).log(), -INF, -INF]])
    case = torch.tensor([0, 1, 1, 1, 1, 1])
    out = sample(
        *(rows[case],), top_k=torch.tensor([2, 0, 0, 0, 0, 3]), top_p=torch.tensor([1.0, 0.0, 0.39, 0.45, 0.65, 0.7]),
        seed=torch.tensor([5, 1, 2, 3, 4, 5]), backend=backend,
    )  # fmt: skip
    kept = [[0, 1, 2, 4], [0], [0], [0, 1], [0, 1, 2], [0, 1, 2]]  # of the last row top-k 3 keeps 4 ids, top-p 3
    for row, ids in enumerate(kept):
        assert int(out.token[row]) in ids
        x = rows[case[row]].double()
        expected = float(x[out.token[row]] - x[ids].logsumexp(dim=0))
        assert float(out.draw_logprob[row]) == pytest.approx(expected, abs=1e-6), row
    assert out.draw_logprob[1:3].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (4, 1.0), (0, 0.5), (1, 1.0), (0, 0.0)])
def test_draw_of_one_possible_id_is_certain(backend, top_k, top_p):
    """At temperature 0 whatever the filters; with noise where they leave one id."""
    logits = random_logits(6, 5000)
    cold = sample(logits, temperature=0.0, top_k=top_k, top_p=top_p, backend=backend)
    assert cold.draw_logprob.tolist() == [0.0] * 6 and (cold.prob < 1).all()
    hot = sample(logits, top_k=top_k, top_p=top_p, backend=backend)
    assert (hot.draw_logprob == 0.0).all() == (top_k == 1 or top_p == 0)
    assert (hot.draw_logprob <= 0.0).all()


@many_rows
def test_probabilities_by_draw_logprob_sum_to_one_over_all_that_is_drawn(backend):
    logits = random_logits(1, 40, seed=8, scale=1.0).expand(4000, 40)
    out = sample(logits, top_k=9, top_p=0.95, seed=3, backend=backend)
    by_token = {token: logprob for token, logprob in zip(out.token.tolist(), out.draw_logprob.tolist(), strict=True)}
    assert len(by_token) > 4 and sum(map(math.exp, by_token.values())) == pytest.approx(1.0, abs=1e-5)


@compiled
def test_a_confident_draw_has_the_logarithm_that_its_probability_rounds_away(backend):
    logits = torch.full((1, 2), 0.0)
    logits[0, 1] = 20.0
    out = sample(logits, backend=backend)
    assert out.token.item() == 1 and out.prob.item() == 1.0
    assert out.draw_logprob.item() == pytest.approx(-math.log1p(math.exp(-20.0)), rel=1e-5)


@many_rows
def test_top_k_keeps_every_tie_with_the_kth(backend):
    logits = torch.tensor([[3.0, 2.0, 2.0, 1.0, 2.0, 0.0]]).expand(500, 6)
    assert set(sample(logits, top_k=2, backend=backend).token.tolist()) == {0, 1, 2, 4}


@many_rows
def test_top_p_keeps_the_id_that_crosses_and_breaks_ties_by_id(backend):
    logits = torch.tensor([0.4, 0.2, 0.2, 0.2]).log().expand(500, 4)
    draw = lambda p: set(sample(logits, top_p=p, backend=backend).token.tolist())  # noqa: E731
    assert draw(0.39) == {0}
    assert draw(0.45) == {0, 1}
    assert draw(0.65) == {0, 1, 2}
    assert draw(0.85) == {0, 1, 2, 3}


def test_a_draw_is_argmax_of_scaled_logits_plus_keyed_gumbel(backend):
    rows = sized(64, interpreted=16)
    logits = random_logits(rows, 333)
    seed, revealed = torch.arange(rows) - rows // 2, -(torch.arange(rows) ** 5) << 20
    token = sample(logits, temperature=0.7, seed=seed, revealed=revealed, backend=backend).token
    words = noise.words(seed, torch.arange(rows, dtype=torch.int32), revealed, 333)
    uniform = (words.double() + 0.5) / 2**32
    assert torch.equal(token, (logits.double() / 0.7 - torch.log(-torch.log1p(-uniform))).argmax(dim=1))


def test_ties_between_pieces_of_a_long_row_go_to_the_lowest_id(backend):
    logits = torch.zeros(2, 18 * 4096)
    logits[0, [4095, 4096, 17 * 4096]] = 1.0
    logits[1, [16 * 4096 + 3, 17 * 4096]] = 1.0
    assert sample(logits, temperature=0.0, backend=backend).token.tolist() == [4095, 16 * 4096 + 3]


@pytest.mark.parametrize("temperature", [1.0, 1e30])
@pytest.mark.parametrize("vocabulary", [1000, 4099])
def test_noise_alone_decides_between_equal_logits(backend, vocabulary, temperature):
    rows = sized(30, interpreted=8)
    seed, position, revealed = torch.arange(rows) << 40, torch.arange(rows, dtype=torch.int32), torch.arange(rows) << 50
    words = noise.words(seed, position, revealed, vocabulary)
    logits = random_logits(rows, vocabulary) if temperature > 1 else torch.zeros(rows, vocabulary)
    out = sample(logits, temperature=temperature, seed=seed, position=position, revealed=revealed, backend=backend)
    assert torch.equal(out.token, words.argmin(dim=1))


@pytest.mark.parametrize("case", KEYED, ids=lambda case: f"seed={case['seed']}")
def test_every_golden_word_tips_the_balance_where_it_should(backend, case):
    """Two ids, one ahead by the difference of their noise and a little more, or a little less."""
    count = (
        sum(id <= 1000 for id in case["ids"]) if backend == "triton" else len(case["ids"])
    )  # the rest are large rows
    words, ids = torch.tensor(case["words"][:count], dtype=torch.float64), case["ids"][:count]
    variate = -torch.log(-torch.log1p(-((words + 0.5) / 2**32).clamp(max=noise.LARGEST_UNIFORM)))
    logits, expected = [], []
    for i in range(count):
        other = (i + 1) % count
        for little, winner in ((1e-4, ids[i]), (-1e-4, ids[other])):
            row = torch.full((max(ids) + 1,), -INF)
            row[ids[i]], row[ids[other]] = float(variate[other] - variate[i] + little), 0.0
            logits.append(row)
            expected.append(winner)
    key = {name: case[name] for name in ("seed", "revealed")}
    position = torch.full((len(expected),), case["position"])
    out = sample(torch.stack(logits), position=position, backend=backend, **key)
    assert out.token.tolist() == expected


@many_rows
@pytest.mark.parametrize("number", range(20))
def test_many_ties_at_the_edge_of_top_p_go_by_id(backend, number):
    pick = Pick(number)
    logits = pick.normal(1, 3000).round().expand(60, 3000)
    settings = {"temperature": 100.0, "top_p": float(pick.uniform()), "seed": number}
    out = sample(logits, backend=backend, **settings)
    assert torch.equal(out.token, sample(logits, backend="reference", **settings).token)
