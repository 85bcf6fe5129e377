"""The Triton kernels of sample_logits against the reference: what is kept, what is drawn, and the statistics."""

from __future__ import annotations

import json
import math
import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import simsd_kernels  # noqa: E402
from simsd_kernels import noise  # noqa: E402
from simsd_kernels.sample_logits import reference  # noqa: E402
from simsd_kernels.sample_logits.triton import CHUNK, CHUNKS_AT_ONCE, scan  # noqa: E402
from test_sample_logits import arguments, random_logits, sample  # noqa: E402

INF = math.inf
GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden_noise.json").read_text())["cases"]
STATISTICS = ("prob", "log_odds", "entropy", "logsumexp")
VOCABULARIES = (1, 2, 3, 7, 16, 129, 1000, 1024, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose(generator, values):
    return values[int(torch.randint(len(values), (), generator=generator))]


def random_case(number):
    """Rows with settings of their own; every option, tie and odd value turns up in some case."""
    generator = torch.Generator().manual_seed(number)
    rows = choose(generator, (2, 3, 5, 17) if number % 8 == 0 else (1, 2, 3))
    vocabulary = VOCABULARIES[number % len(VOCABULARIES)]
    logits = torch.randn(rows, vocabulary, generator=generator) * choose(generator, (0.01, 1.0, 3.0, 30.0))
    if number % 3 == 0:
        logits = (logits * 2).round() / 2  # ties, also of -0 and 0
    logits = logits.to(DTYPES[number // 3 % 3])
    if number % 4 == 1:
        odd = torch.tensor([math.nan, -INF, INF, -0.0])[torch.randint(4, logits.shape, generator=generator)]
        logits = torch.where(torch.rand(logits.shape, generator=generator) < 0.3, odd.to(logits.dtype), logits)
        logits[0] = choose(generator, (math.nan, -INF, 0.0))
    if number % 5 == 2:
        logits = logits.T.contiguous().T
    if number % 5 == 4:
        logits = logits.repeat_interleave(2, dim=1)[:, ::2]

    def spread(values):
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=generator)]

    banned = None
    if number % 2 and vocabulary > 1:
        banned = torch.randint(vocabulary, (min(vocabulary - 1, 6),), generator=generator).tolist()
    return logits, {
        "temperature": spread([0.0, 0.3, 0.7, 1.0, 1.0, 2.0]),
        "top_k": spread([0, 0, 1, 2, 5, 40, vocabulary, vocabulary + 7]),
        "top_p": spread([1.0, 1.0, 0.0, 0.1, 0.5, 0.9, 0.999, 1 - 2.0**-24]),
        "seed": torch.randint(-(2**62), 2**62, (rows,), generator=generator) * 2,
        "position": torch.randint(-(2**31), 2**31, (rows,), generator=generator),
        "revealed": torch.randint(-(2**62), 2**62, (rows,), generator=generator) * 2 + 1,
        "banned": banned,
    }


def assert_close(out, expected):
    assert torch.equal(out.token, expected.token)
    for name in STATISTICS:
        given, wanted = getattr(out, name), getattr(expected, name)
        if name == "log_odds":  # the reference takes it for the difference of two numbers of this size
            huge = expected.logsumexp.abs() > 1e30
            given, wanted = given.masked_fill(huge, 0.0), wanted.masked_fill(huge, 0.0)
        torch.testing.assert_close(given, wanted, rtol=5e-6, atol=5e-6, msg=name)


@pytest.mark.parametrize("number", range(48))
def test_random_rows_as_the_reference(number):
    logits, settings = random_case(number)
    assert_close(sample(logits, backend="triton", **settings), sample(logits, backend="reference", **settings))


def kept(logits, temperature=1.0, top_k=0, top_p=1.0, banned=None, **_):
    """Boolean [R, V]: what the cutoffs of the kernels keep, and what the definition does."""
    _, temperature, top_k, top_p, *_, banned_ids = arguments(logits, temperature, top_k, top_p, banned=banned)
    mask = reference.banned_mask(banned_ids, logits.shape[1], logits.device)
    x = reference.scale(logits, temperature, mask)
    banned_bytes = None if banned is None else mask.to(torch.uint8)
    _, _, cutoff = scan(logits[:, None], banned_bytes, None, None, temperature, top_k, top_p, None, None, None)
    bits = torch.where(x == 0, 0.0, x).view(torch.int32)
    key, ids = bits ^ ((bits >> 31) & 0x7FFFFFFF), torch.arange(logits.shape[1])
    last_key, last_id = cutoff[:, :1], cutoff[:, 1:]
    inside = (x > -INF) & ((key > last_key) | ((key == last_key) & (ids <= last_id)))
    expected = reference.keep(x, top_k, top_p)
    return inside, torch.where((temperature > 0)[:, None], expected, x > -INF)


@pytest.mark.parametrize("number", range(100, 144))
def test_filters_keep_exactly_what_the_definition_keeps(number):
    logits, settings = random_case(number)
    given, expected = kept(logits, **settings)
    assert torch.equal(given, expected), (given.sum(dim=1), expected.sum(dim=1), settings)


def test_top_k_keeps_every_tie_with_the_kth_across_chunks():
    logits = torch.full((1, 2 * CHUNK + 9), -1.0)
    logits[0, [3, CHUNK - 1, CHUNK, 2 * CHUNK + 8]] = 2.0
    logits[0, 77] = 5.0
    for top_k, count in ((1, 1), (2, 5), (4, 5), (5, 5), (6, logits.numel())):
        given, expected = kept(logits, top_k=top_k)
        assert torch.equal(given, expected) and given.sum() == count


@pytest.mark.parametrize("top_p, count", [(0.0, 1), (0.125, 1), (0.1251, 2), (0.5, 4), (0.75, 6), (0.9999, 8)])
def test_top_p_ends_with_the_lowest_ids_of_a_tie_across_chunks(top_p, count):
    logits = torch.full((1, CHUNK + 100), -200.0)
    ids = [0, 5, CHUNK - 2, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 50, CHUNK + 99]
    logits[0, ids] = 3.0
    given, expected = kept(logits, top_p=top_p)
    assert given[0].nonzero().flatten().tolist() == ids[:count]
    assert torch.equal(given, expected)


def test_all_ids_equal():
    logits = torch.zeros(5, CHUNK + 24)
    top_p = torch.tensor([0.0, 0.25, 0.5, 1.0, 1.0])
    given, expected = kept(logits, top_k=torch.tensor([0, 0, 9, 9, 0]), top_p=top_p)
    assert torch.equal(given, expected)
    assert given.sum(dim=1).tolist() == [1, 1030, 2060, CHUNK + 24, CHUNK + 24]


def test_top_p_acts_on_what_top_k_left():
    logits = torch.tensor([[0.4, 0.2, 0.2, 0.15, 0.05]]).log()
    for top_k, top_p, ids in ((0, 0.65, [0, 1, 2]), (1, 0.99, [0]), (3, 0.7, [0, 1]), (3, 0.76, [0, 1, 2])):
        assert kept(logits, top_k=top_k, top_p=top_p)[0][0].nonzero().flatten().tolist() == ids


def test_extreme_logits_do_not_disturb_the_search():
    logits = random_logits(6, 500, seed=3)
    logits[0, ::2] = torch.finfo(torch.float32).min
    logits[1, 7] = INF
    logits[2] *= 1e30
    logits[3] *= 1e-38
    logits[4] -= 1e6
    logits[5, 1:] = -INF
    for settings in ({"top_p": 0.8}, {"top_k": 300, "top_p": 0.6}):
        given, expected = kept(logits, **settings)
        assert torch.equal(given, expected), settings


def test_rows_that_do_not_filter_keep_everything():
    logits = random_logits(4, 300)
    given, _ = kept(
        logits,
        temperature=torch.tensor([1.0, 0.0, 1.0, 1.0]),
        top_k=torch.tensor([0, 3, 300, -1]),
        top_p=torch.tensor([1.0, 0.1, 1.5, math.nan]),  # as values on CUDA are trusted
    )
    assert given.all()


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"seed={case['seed']}")
def test_draws_are_those_of_the_golden_noise(case):
    """Two ids get a chance in each row: the one whose noise is larger wins."""
    ids, words = case["ids"][:9], torch.tensor(case["words"][:9])  # up to id 1000: the rest would take large rows
    variate = noise.gumbel(words).tolist()
    pairs = [(a, (a + 4) % 9) for a in range(9)]
    logits = torch.full((len(pairs), 1001), -INF)
    for row, (a, b) in enumerate(pairs):
        logits[row, [ids[a], ids[b]]] = 0.0
    key = {"seed": case["seed"], "position": torch.tensor(case["position"]), "revealed": case["revealed"]}
    out = sample(logits, backend="triton", **key)
    assert out.token.tolist() == [ids[a] if variate[a] > variate[b] else ids[b] for a, b in pairs]


def test_confident_rows_still_rank_by_log_odds():
    margins = torch.tensor([20.0, 30.0, 50.0, 100.0, 200.0, 1000.0])
    logits = torch.zeros(6, CHUNK + 4)
    logits[:, CHUNK + 1] = margins
    out = sample(logits, temperature=0.0, backend="triton")
    torch.testing.assert_close(out.log_odds.double(), margins.double() - math.log(CHUNK + 3), rtol=1e-6, atol=1e-6)
    assert (out.entropy.diff() <= 0).all() and (out.entropy[:4] > 0).all()
    weight = (CHUNK + 3) * torch.exp(-margins[1:3].double())
    torch.testing.assert_close(out.entropy[1:3].double(), (1 + margins[1:3]) * weight, rtol=1e-4, atol=0)


def test_many_chunks_merge_to_the_statistics_of_float64():
    logits = random_logits(2, (CHUNKS_AT_ONCE + 1) * CHUNK + 3, seed=1, scale=2.0)
    logits[1, :CHUNK] = -INF
    out = sample(logits, temperature=0.0, backend="triton")
    log_p = logits.double().log_softmax(dim=1)
    torch.testing.assert_close(out.logsumexp.double(), logits.double().logsumexp(dim=1), rtol=1e-6, atol=1e-6)
    entropy = -(log_p.exp() * log_p).nan_to_num(nan=0.0).sum(dim=1)
    torch.testing.assert_close(out.entropy.double(), entropy, rtol=2e-6, atol=0)
    assert torch.equal(out.token, logits.argmax(dim=1))


def test_ties_between_chunks_go_to_the_lowest_id():
    logits = torch.zeros(2, 18 * CHUNK)
    logits[0, [CHUNK - 1, CHUNK, 17 * CHUNK]] = 1.0
    logits[1, [16 * CHUNK + 3, 17 * CHUNK]] = 1.0
    assert sample(logits, temperature=0.0, backend="triton").token.tolist() == [CHUNK - 1, 16 * CHUNK + 3]


@pytest.mark.parametrize("number", [8, 16])
def test_a_row_gives_the_same_bits_in_any_company(number):
    logits, settings = random_case(number)
    rows = logits.shape[0]
    together = sample(logits, backend="triton", **settings)
    banned = settings.pop("banned")
    for row in {0, rows // 2, rows - 1}:
        one = {name: value[row : row + 1] for name, value in settings.items()}
        alone = sample(logits[row : row + 1], backend="triton", banned=banned, **one)
        for name, value, company in zip(alone._fields, alone, together, strict=True):
            assert torch.equal(value, company[row : row + 1]), name
    assert rows > 1


@pytest.mark.parametrize("value", [math.nan, -INF])
def test_row_with_nothing_finite_gives_the_lowest_allowed_id(value):
    out = sample(torch.full((2, 700), value), banned=[0, 1, 3], top_k=2, top_p=0.5, backend="triton")
    assert out.token.tolist() == [2, 2]
    assert out.prob.tolist() == [0, 0] and out.entropy.tolist() == [0, 0]
    assert out.log_odds.tolist() == [-INF, -INF] and out.logsumexp.tolist() == [-INF, -INF]


def test_no_rows_are_fine():
    out = sample(torch.zeros(0, 10), backend="triton")
    assert [tuple(value.shape) for value in out] == [(0,)] * 5
    assert [value.dtype for value in out] == [torch.int64] + [torch.float32] * 4


def test_float64_is_refused_by_name():
    with pytest.raises(RuntimeError, match="triton: supports float32, bfloat16 and float16, got torch.float64"):
        simsd_kernels.sample_logits(*arguments(torch.zeros(1, 3).double()), backend="triton")


@pytest.mark.parametrize("value", [-3.4e38, 65504.0, 3.4e38], ids=str)
def test_equal_logits_of_any_size_are_equally_likely(value):
    out = sample(torch.full((1, 7), value), temperature=0.0, backend="triton")
    torch.testing.assert_close(out.log_odds, torch.tensor([-math.log(6)]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.entropy, torch.tensor([math.log(7)]), rtol=1e-6, atol=1e-6)
