"""Draws, their statistics and their noise, against float64 torch and against the law they claim."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import simsd_kernels
from arguments import Pick, relaid
from backends import FLOATS, backends, callable_of, device_of, each_dtype, kernels, needs_compiled_ops
from chi_squared import assert_distributed
from logits import INF, VOCABULARIES, random_banned, random_values
from simsd_kernels import dispatch, noise

sample_logits = callable_of("sample_logits")
NAMES = ("logits", "temperature", "top_k", "top_p", "seed", "position", "revealed", "banned_ids")
LANES = NAMES[:-1]
STATISTICS = ("prob", "log_odds", "entropy", "logsumexp")
KEYED = json.loads((pathlib.Path(__file__).parents[1] / "golden_noise.json").read_text())["cases"]
CASES = {"reference": 0, "cpu": 60, "triton": 60, "cuda": 400}
many_rows = backends("reference", "cpu", "cuda")  # each is a program of its own in Triton's interpreter


def arguments(logits, temperature=1.0, top_k=0, top_p=1.0, seed=0, position=None, revealed=0, banned=None):
    """The op's arguments, scalars spread over the rows; position counts the rows unless given."""
    rows = logits.shape[0]
    position = torch.arange(rows) if position is None else position

    def spread(value, dtype):
        return torch.as_tensor(value).to(dtype).expand(rows).clone()

    return (
        logits,
        spread(temperature, torch.float32),
        spread(top_k, torch.int32),
        spread(top_p, torch.float32),
        spread(seed, torch.int64),
        spread(position, torch.int32),
        spread(revealed, torch.int64),
        None if banned is None else torch.tensor(banned, dtype=torch.int64),
    )


def sample(logits, *, backend, **settings):
    return sample_logits(*arguments(logits, **settings), backend=backend)


def good_arguments() -> dict:
    return dict(zip(NAMES, arguments(torch.zeros(2, 5)), strict=True))


def random_case(seed: int):
    """Logits, and settings of their own for each row."""
    pick = Pick(seed)
    rows, vocabulary = pick(0, *[1, 1, 2, 3, 5] * 5, 17), pick(*VOCABULARIES)
    logits = relaid(random_values(pick, rows, vocabulary).to(pick(*FLOATS)), pick)
    filtered = pick(False, True)
    settings = {
        "temperature": pick.each(rows, 0.0, 0.3, 0.9, 1.0, 1.0, 7.0, 1e6),
        "top_k": pick.each(rows, 0, 1, 2, 7, 40, vocabulary // 2, vocabulary, vocabulary + 5) if filtered else 0,
        "top_p": pick.each(rows, 1.0, 1.0, 0.0, 0.1, 0.5, 0.9, 0.999, 1 - 2.0**-24) if filtered else 1.0,
        "seed": pick.integers(-(2**63), 2**63 - 1, rows),
        "position": pick.integers(-(2**31), 2**31 - 1, rows),
        "revealed": pick.integers(-(2**63), 2**63 - 1, rows),
        "banned": random_banned(pick, vocabulary),
    }
    return logits, settings


def random_arguments(seed: int) -> dict:
    logits, settings = random_case(seed)
    return dict(zip(NAMES, arguments(logits, **settings), strict=True))


def row_of(logits, settings, row):
    one = {name: value[row : row + 1] if torch.is_tensor(value) else value for name, value in settings.items()}
    return logits[row : row + 1], one


def random_logits(rows, vocabulary, seed=0, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocabulary, generator=generator) * scale).to(dtype)


@kernels
def test_tokens_and_statistics_are_those_of_the_definition(backend, seed):
    logits, settings = random_case(seed)
    out = sample(logits, backend=backend, **settings)
    heat = torch.where(settings["temperature"] > 0, settings["temperature"], 1.0)
    magnitude = (logits.float().nan_to_num(0.0).abs().amax(dim=1) / heat).max() if len(logits) else 0.0
    epsilons = {"reference": 2.0**-23, "cpu": 0.0 if backend == "cuda" else 2.0**-23}  # the reference sums in float32
    for other in ("reference", "cpu") if backend == "cuda" else ("reference",):
        expected = sample(logits, backend=other, **settings)
        assert torch.equal(out.token, expected.token), other
        for name in STATISTICS:
            close = {"rtol": 5e-6, "atol": 5e-6 + epsilons[other] * min(float(magnitude), 1e30)}
            torch.testing.assert_close(getattr(out, name), getattr(expected, name), **close, msg=name)
    if len(logits):
        row = seed % len(logits)
        one, alone = row_of(logits, settings, row)
        again = sample(one, backend=backend, **alone)
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(out, again, strict=True))


@each_dtype
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 15, 16, 17, 63, 64, 65, 511, 512, 513, 2000])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_statistics_are_those_of_float64_softmax(backend, dtype, vocabulary, temperature):
    logits = random_logits(6, vocabulary, seed=vocabulary, dtype=dtype)
    out = sample(logits, temperature=temperature, seed=9, backend=backend)
    x = logits.double() / (float(torch.tensor(temperature)) or 1.0)
    log_p = x.log_softmax(dim=1)
    chosen = log_p.gather(1, out.token[:, None]).squeeze(1)
    others = torch.logsumexp(x.scatter(1, out.token[:, None], -INF), dim=1)
    close = {"rtol": 2e-6, "atol": 2e-6, "check_dtype": False}
    torch.testing.assert_close(out.prob, chosen.exp(), **close)
    torch.testing.assert_close(out.log_odds, x.gather(1, out.token[:, None]).squeeze(1) - others, **close)
    torch.testing.assert_close(out.entropy, -(log_p.exp() * log_p).sum(dim=1), **close)
    torch.testing.assert_close(out.logsumexp, x.logsumexp(dim=1), **close)
    if temperature == 0:
        assert torch.equal(out.token, logits.double().argmax(dim=1))


def test_confident_rows_still_rank_by_log_odds(backend):
    margins = torch.tensor([20.0, 30.0, 50.0, 100.0, 200.0, 1000.0])
    logits = torch.zeros(6, 50)
    logits[:, 7] = margins
    out = sample(logits, temperature=0.0, backend=backend)
    assert (out.prob == 1.0)[1:].all()
    expected = margins.double() - math.log(49)
    torch.testing.assert_close(out.log_odds.double(), expected, rtol=1e-6, atol=1e-6)
    assert (out.entropy.diff() <= 0).all() and (out.entropy[:4] > 0).all()
    weight = 49 * torch.exp(-margins[:3].double())
    torch.testing.assert_close(out.entropy[:3].double(), (1 + margins[:3]) * weight, rtol=1e-4, atol=0)


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


@many_rows
def test_sampled_runner_up_has_its_own_log_odds(backend):
    logits = torch.tensor([[5.0, 4.5, -3.0, 4.0]]).repeat(200, 1)
    out = sample(logits, backend=backend)
    assert set(out.token.tolist()) >= {0, 1, 3}
    x = logits[0].double()
    for token in (0, 1, 3):
        others = torch.cat((x[:token], x[token + 1 :])).logsumexp(dim=0)
        given = out.log_odds[out.token == token].double()
        torch.testing.assert_close(given, (x[token] - others).expand_as(given), rtol=0, atol=1e-5)


def test_statistics_ignore_top_k_and_top_p(backend):
    logits = random_logits(8, 100)
    plain = sample(logits, temperature=0.0, backend=backend)
    filtered = sample(logits, temperature=1.0, top_k=1, top_p=0.1, backend=backend)
    assert torch.equal(filtered.token, plain.token)
    for name in STATISTICS:
        assert torch.equal(getattr(filtered, name), getattr(plain, name)), name


@pytest.mark.parametrize("value", [math.nan, -INF])
def test_nan_and_minus_infinity_are_never_drawn_and_weigh_nothing(backend, value):
    logits = random_logits(40, 30)
    logits[:, ::2] = value
    for temperature in (0.0, 1.0):
        out = sample(logits, temperature=temperature, backend=backend)
        short = logits[:, 1::2].double()
        assert (out.token % 2 == 1).all()
        torch.testing.assert_close(out.logsumexp, short.logsumexp(dim=1), check_dtype=False)
        p = short.softmax(dim=1)
        torch.testing.assert_close(out.entropy, -(p * p.log()).sum(dim=1), check_dtype=False, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, -INF])
def test_row_with_nothing_finite_gives_lowest_allowed_id_and_probability_zero(backend, temperature, value):
    out = sample(torch.full((2, 700), value), temperature=temperature, banned=[0, 1, 3], top_k=2, backend=backend)
    assert out.token.tolist() == [2, 2]
    assert out.prob.tolist() == [0, 0] and out.entropy.tolist() == [0, 0]
    assert out.log_odds.tolist() == [-INF, -INF] and out.logsumexp.tolist() == [-INF, -INF]


def test_single_finite_entry_is_certain(backend):
    logits = torch.full((1, 600), -INF)
    logits[0, 555] = -3.0
    out = sample(logits, backend=backend)
    assert out.token.item() == 555 and out.prob.item() == 1.0 and out.log_odds.item() == INF
    assert out.entropy.item() == 0.0 and out.logsumexp.item() == -3.0


def test_overflow_saturates_instead_of_giving_nan(backend):
    logits = torch.tensor([[1.0, INF, 2.0, 3.0], [10.0, 20.0, -5.0, 0.0]])
    out = sample(logits, temperature=torch.tensor([1.0, 1e-38]), backend=backend)
    assert out.token[0].item() == 1 and out.prob[0].item() == 1.0
    assert not any(torch.isnan(value).any() for value in out)
    huge = sample(torch.tensor([[3e38, -3e38, 2.9e38]]), temperature=0.0, backend=backend)
    assert huge.token.item() == 0 and not any(torch.isnan(value).any() for value in huge)


def test_banned_ids_are_as_if_absent(backend):
    logits = random_logits(50, 600)
    banned = [0, 5, 5, 511, 512, 599]
    allowed = torch.ones(600, dtype=torch.bool)
    allowed[banned] = False
    for temperature in (0.0, 1.0):
        out = sample(logits, temperature=temperature, banned=banned, backend=backend)
        blanked = sample(logits.masked_fill(~allowed, -INF), temperature=temperature, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(out, blanked, strict=True))
        assert allowed[out.token].all()


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


def test_settings_are_per_row(backend):
    logits = random_logits(1, 50).expand(6, 50)
    mixed = {
        "temperature": torch.tensor([0.0, 1.0, 0.5, 1.0, 2.0, 0.0]),
        "top_k": torch.tensor([3, 0, 4, 2, 0, 0]),
        "top_p": torch.tensor([0.5, 1.0, 1.0, 0.3, 0.9, 1.0]),
        "seed": torch.arange(6),
    }
    together = sample(logits, backend=backend, **mixed)
    for row in range(6):
        one = {name: value[row : row + 1] for name, value in mixed.items()}
        alone = sample(logits[row : row + 1], backend=backend, position=torch.tensor([row]), **one)
        assert all(torch.equal(a[row], b[0]) for a, b in zip(together, alone, strict=True)), row


def test_a_draw_is_argmax_of_scaled_logits_plus_keyed_gumbel(backend):
    logits = random_logits(64, 333)
    seed, revealed = torch.arange(64) - 30, -(torch.arange(64) ** 5) << 20
    token = sample(logits, temperature=0.7, seed=seed, revealed=revealed, backend=backend).token
    words = noise.words(seed, torch.arange(64, dtype=torch.int32), revealed, 333)
    uniform = (words.double() + 0.5) / 2**32
    assert torch.equal(token, (logits.double() / 0.7 - torch.log(-torch.log1p(-uniform))).argmax(dim=1))


@backends("cpu", "cuda")
@pytest.mark.parametrize(
    "rows, vocabulary",
    [*((40, v) for v in (1, 2, 3, 4, 5, 7, 8, 31, 64, 100, 255, 256, 257, 512, 1000, 1023, 1025, 2000)), (3, 151936)],
)
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (20, 1.0), (0, 0.9), (50, 0.95)])
def test_same_tokens_and_statistics_as_the_reference(backend, rows, vocabulary, top_k, top_p):
    logits = random_logits(rows, vocabulary, seed=vocabulary, scale=4.0)
    settings = {"temperature": 0.9, "top_k": top_k, "top_p": top_p, "seed": 123456789012345, "revealed": 77}
    banned = [vocabulary // 2] if vocabulary > 1 else None
    given = sample(logits, banned=banned, backend=backend, **settings)
    expected = sample(logits, banned=banned, backend="reference", **settings)
    assert torch.equal(given.token, expected.token)
    for name in STATISTICS:
        torch.testing.assert_close(getattr(given, name), getattr(expected, name), rtol=5e-6, atol=5e-6, msg=name)


CAPABILITY_SCRIPT = """
import torch, simsd_kernels
from test_sample_logits import random_logits, sample
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for vocabulary in (5, 700, 5000):
        logits = random_logits(30, vocabulary, dtype=dtype)
        logits[0, ::2], logits[1], logits[2, 1] = -torch.inf, torch.nan, 6e-8
        for settings in ({"temperature": 0.0}, {"seed": 3}, {"top_k": 9, "top_p": 0.8}):
            given, expected = (sample(logits, backend=name, **settings) for name in ("cpu", "reference"))
            assert torch.equal(given.token, expected.token), (dtype, vocabulary, settings)
            for a, b in zip(given[1:], expected[1:]):
                torch.testing.assert_close(a, b, rtol=5e-6, atol=5e-6)
print(torch.ops.simsd._cpu_capability())
"""


@needs_compiled_ops
@pytest.mark.parametrize("capability", ["portable", "avx2"])
def test_lesser_instruction_sets_agree_with_the_reference(capability):
    order = ["portable", "avx2", "avx512"]
    if order.index(capability) > order.index(torch.ops.simsd._cpu_capability()):
        pytest.skip(f"this machine has no {capability}")
    environment = {**os.environ, "SIMSD_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", CAPABILITY_SCRIPT],
        cwd=pathlib.Path(__file__).parent,
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == capability


def test_result_does_not_depend_on_rows_strides_or_threads(backend, threads):
    logits = random_logits(33, 1003)
    whole = sample(logits, top_k=torch.arange(33) % 3 * 10, backend=backend)
    strided = torch.empty(1003, 70)[:, ::2][:, :33].T.copy_(logits)
    assert strided.stride(1) != 1
    padded = torch.full((33, 1100), math.nan)[:, :1003].copy_(logits)
    threads(1)
    for view in (strided, padded):
        again = sample(view, top_k=torch.arange(33) % 3 * 10, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for row in (0, 7, 32):
        alone = sample(logits[row : row + 1], top_k=row % 3 * 10, position=torch.tensor([row]), backend=backend)
        assert torch.equal(alone.token[0], whole.token[row])
        if backend != "reference":  # torch's reductions may add up one row in another order than many
            assert all(torch.equal(a[row], b[0]) for a, b in zip(whole, alone, strict=True))


@many_rows
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_small_input_gives_an_allowed_token(backend, data):
    value = st.sampled_from([0.0, 1.0, -2.5, 8.0, -INF, math.nan, 1e30, INF])
    rows, vocabulary = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 9))
    numbers = data.draw(st.lists(value, min_size=rows * vocabulary, max_size=rows * vocabulary))
    logits = torch.tensor(numbers).reshape(rows, vocabulary)
    banned = data.draw(st.lists(st.integers(0, vocabulary - 1), max_size=vocabulary - 1))
    out = sample_logits(
        *arguments(
            logits,
            temperature=data.draw(st.sampled_from([0.0, 0.5, 1.0, 1e-30])),
            top_k=data.draw(st.integers(0, 10)),
            top_p=data.draw(st.floats(0, 1, width=32)),
            seed=data.draw(st.integers(-(2**63), 2**63 - 1)),
            revealed=data.draw(st.integers(-(2**63), 2**63 - 1)),
            banned=banned,
        ),
        backend=backend,
    )
    for row in range(rows):
        x = logits[row].nan_to_num(nan=-INF, posinf=torch.finfo(torch.float32).max, neginf=-INF).clone()
        x[banned] = -INF
        token = int(out.token[row])
        assert token not in banned and 0 <= token < vocabulary
        assert x[token] > -INF or bool((x == -INF).all())
        assert 0 <= out.prob[row] <= 1 and 0 <= out.entropy[row] <= math.log(vocabulary) + 1e-5
        assert not any(math.isnan(value[row]) for value in out)


def test_no_rows_are_fine(backend):
    out = sample(torch.zeros(0, 10), backend=backend)
    assert [tuple(value.shape) for value in out] == [(0,)] * 5
    assert [value.dtype for value in out] == [torch.int64] + [torch.float32] * 4


def test_reference_takes_float64():
    logits = random_logits(4, 50).double()
    out = sample(logits, temperature=0.0, backend="reference")
    assert torch.equal(out.token, logits.argmax(dim=1)) and out.prob.dtype == torch.float32


REFUSED = [
    ("logits", torch.zeros(2, 3, 4), ValueError, r"logits must be \[R, V\].*got \[2, 3, 4\]"),
    ("logits", torch.zeros(2, 0), ValueError, r"at least one vocabulary entry, got \[2, 0\]"),
    ("logits", torch.zeros(2, 5, dtype=torch.int64), TypeError, "logits must be .*got torch.int64"),
    ("logits", [[1.0]], TypeError, "logits must be a tensor, got list"),
    ("temperature", torch.zeros(3), ValueError, r"temperature must be \[R\] = \[2\], got \[3\]"),
    ("temperature", torch.zeros(2, dtype=torch.float64), TypeError, "temperature must be torch.float32"),
    ("temperature", torch.tensor([1.0, -0.5]), ValueError, "temperature must be finite and >= 0, got -0.5"),
    ("temperature", torch.tensor([1.0, math.nan]), ValueError, "temperature must be finite and >= 0, got nan"),
    ("temperature", torch.tensor([1.0, INF]), ValueError, "temperature must be finite and >= 0, got inf"),
    ("top_k", torch.tensor([1, -2], dtype=torch.int32), ValueError, "top_k must be >= 0 .*got -2"),
    ("top_k", torch.tensor([1, 2]), TypeError, "top_k must be torch.int32, got torch.int64"),
    ("top_p", torch.tensor([0.5, 1.5]), ValueError, r"top_p must be in \[0, 1\].*got 1.5"),
    ("seed", torch.zeros(2, dtype=torch.int32), TypeError, "seed must be torch.int64"),
    ("position", torch.zeros(2), TypeError, "position must be torch.int32"),
    ("revealed", torch.zeros(2, 1, dtype=torch.int64), ValueError, "revealed must be"),
    ("banned_ids", torch.tensor([1, 5]), ValueError, r"banned_ids must be in \[0, 5\), got 5"),
    ("banned_ids", torch.tensor([-1]), ValueError, r"banned_ids must be in \[0, 5\), got -1"),
    ("banned_ids", torch.arange(5), ValueError, "must leave an id to draw, got all 5"),
    ("banned_ids", torch.zeros(1), TypeError, "banned_ids must be torch.int64"),
    ("seed", torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "one device.*seed on meta"),
]


def test_unknown_backend_says_what_to_do():
    with pytest.raises(ValueError, match="backend='gpu' is unknown: choose one of reference, cpu, triton, cuda"):
        sample(torch.zeros(1, 4), backend="gpu")
    with pytest.raises(RuntimeError, match="cuda: needs cuda tensors, got cpu"):
        simsd_kernels.sample_logits(*arguments(torch.zeros(1, 4)), backend="cuda")


@kernels
def test_float64_is_refused_by_name(backend):
    with pytest.raises(RuntimeError, match=f"{backend}: supports float32, bfloat16 and float16, got torch.float64"):
        sample(torch.zeros(1, 3).double(), backend=backend)


def test_opcheck():
    logits = random_logits(3, 20)
    torch.library.opcheck(torch.ops.simsd.sample_logits, arguments(logits, top_k=4, top_p=0.9, banned=[3]))
    torch.library.opcheck(torch.ops.simsd.sample_logits, arguments(logits.bfloat16()))


def test_ties_between_pieces_of_a_long_row_go_to_the_lowest_id(backend):
    logits = torch.zeros(2, 18 * 4096)
    logits[0, [4095, 4096, 17 * 4096]] = 1.0
    logits[1, [16 * 4096 + 3, 17 * 4096]] = 1.0
    assert sample(logits, temperature=0.0, backend=backend).token.tolist() == [4095, 16 * 4096 + 3]


def test_pieces_of_a_long_row_merge_to_the_statistics_of_float64(backend):
    logits = random_logits(2, 17 * 4096 + 3, seed=1, scale=2.0)
    logits[1, :4096] = -INF
    out = sample(logits, temperature=0.0, backend=backend)
    log_p = logits.double().log_softmax(dim=1)
    torch.testing.assert_close(out.logsumexp.double(), logits.double().logsumexp(dim=1), rtol=1e-6, atol=1e-6)
    entropy = -(log_p.exp() * log_p).nan_to_num(nan=0.0).sum(dim=1)
    torch.testing.assert_close(out.entropy.double(), entropy, rtol=2e-6, atol=0)
    assert torch.equal(out.token, logits.argmax(dim=1))


@pytest.mark.parametrize("temperature", [1.0, 1e30])
@pytest.mark.parametrize("vocabulary", [1000, 4099])
def test_noise_alone_decides_between_equal_logits(backend, vocabulary, temperature):
    rows = 30
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


@backends("cuda")
def test_values_that_the_api_refuses_are_harmless(backend):
    operator, device = dispatch.operator("sample_logits", backend), device_of(backend)
    logits = random_logits(4, 2000)
    given = dict(zip(NAMES, arguments(logits, temperature=1.0, banned=[3]), strict=True))

    def call(**changes):
        return [x.cpu() for x in operator(**{name: x.to(device) for name, x in {**given, **changes}.items()})]

    odd = call(
        top_k=torch.full((4,), -3, dtype=torch.int32),
        top_p=torch.full((4,), 1.5),
        banned_ids=torch.tensor([-1, 3, 2000, 2**40, -(2**62)]),
    )
    assert all(map(torch.equal, call(), odd))
    cold = call(temperature=torch.full((4,), -1.0))
    assert torch.equal(cold[0], sample(logits, temperature=0.0, banned=[3], backend="reference").token)
    everything = call(banned_ids=torch.arange(2000))
    assert everything[0].tolist() == [0] * 4 and everything[1].tolist() == [0.0] * 4


@backends("emulation")
@each_dtype
def test_an_aligned_row_without_filters_is_read_once(counted, dtype):
    logits = random_logits(3, 5000, dtype=dtype)
    row_bytes = 5000 * dtype.itemsize
    for temperature in (0.0, 1.0, 0.7):
        counters = counted(lambda heat=temperature: sample(logits, temperature=heat, backend="cuda"))
        assert counters["loaded_bytes"] == 3 * row_bytes and counters["launches"] == 2
    one = counted(lambda: sample(logits[1:2], top_k=20, position=torch.tensor([1]), backend="cuda"))
    three = counted(lambda: sample(logits, top_k=torch.tensor([0, 20, 0]), backend="cuda"))
    assert three["loaded_bytes"] == 2 * row_bytes + one["loaded_bytes"]


@backends("emulation")
def test_a_filter_reads_segments_that_cannot_matter_once_more_at_most(counted):
    logits = random_logits(1, 64 * 1024) - 20.0
    logits[0, 5000:5064] += 40.0  # one segment has all that top-k keeps
    assert counted(lambda: sample(logits, top_k=50, backend="cuda"))["loaded_bytes"] < 2.1 * logits.numel() * 4


@backends("emulation")
def test_automatic_choice_is_left_to_cpu_tensors():
    good = arguments(torch.zeros(2, 5))
    assert sample_logits(*good, backend="cuda").token.tolist() == sample_logits(*good).token.tolist()
