"""Draws and their statistics, against float64 torch and against the definition."""

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
from backends import backends, device_of, each_dtype, kernels, needs_compiled_ops, sized
from logits import INF, NAMES, arguments, random_case, random_logits, row_of, sample, sample_logits
from simsd_kernels import dispatch

LANES = NAMES[:-1]
STATISTICS = ("prob", "log_odds", "entropy", "logsumexp")
CASES = {"reference": 0, "cpu": 60, "triton": 60, "cuda": 400}
many_rows = backends("reference", "cpu", "cuda")  # each is a program of its own in Triton's interpreter


def good_arguments() -> dict:
    return dict(zip(NAMES, arguments(torch.zeros(2, 5)), strict=True))


def random_arguments(seed: int) -> dict:
    logits, settings = random_case(seed)
    return dict(zip(NAMES, arguments(logits, **settings), strict=True))


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
        for name in (*STATISTICS, "draw_logprob"):
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
    logits = random_logits(sized(6, interpreted=2), vocabulary, seed=vocabulary, dtype=dtype)
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
    assert out.draw_logprob.tolist() == [-INF, -INF]


def test_single_finite_entry_is_certain(backend):
    logits = torch.full((1, 600), -INF)
    logits[0, 555] = -3.0
    out = sample(logits, backend=backend)
    assert out.token.item() == 555 and out.prob.item() == 1.0 and out.log_odds.item() == INF
    assert out.entropy.item() == 0.0 and out.logsumexp.item() == -3.0 and out.draw_logprob.item() == 0.0


def test_overflow_saturates_instead_of_giving_nan(backend):
    logits = torch.tensor([[1.0, INF, 2.0, 3.0], [10.0, 20.0, -5.0, 0.0]])
    out = sample(logits, temperature=torch.tensor([1.0, 1e-38]), backend=backend)
    assert out.token[0].item() == 1 and out.prob[0].item() == 1.0
    assert not any(torch.isnan(value).any() for value in out)
    huge = sample(torch.tensor([[3e38, -3e38, 2.9e38]]), temperature=0.0, backend=backend)
    assert huge.token.item() == 0 and not any(torch.isnan(value).any() for value in huge)


def test_banned_ids_are_as_if_absent(backend):
    logits = random_logits(sized(50, interpreted=10), 600)
    banned = [0, 5, 5, 511, 512, 599]
    allowed = torch.ones(600, dtype=torch.bool)
    allowed[banned] = False
    for temperature in (0.0, 1.0):
        out = sample(logits, temperature=temperature, banned=banned, backend=backend)
        blanked = sample(logits.masked_fill(~allowed, -INF), temperature=temperature, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(out, blanked, strict=True))
        assert allowed[out.token].all()


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
    for name in (*STATISTICS, "draw_logprob"):
        torch.testing.assert_close(getattr(given, name), getattr(expected, name), rtol=5e-6, atol=5e-6, msg=name)


CAPABILITY_SCRIPT = """
import torch, simsd_kernels
from logits import random_logits, sample
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
    rows = sized(33, interpreted=8)
    logits = random_logits(rows, 1003)
    whole = sample(logits, top_k=torch.arange(rows) % 3 * 10, backend=backend)
    strided = torch.empty(1003, 70)[:, ::2][:, :rows].T.copy_(logits)
    assert strided.stride(1) != 1
    padded = torch.full((rows, 1100), math.nan)[:, :1003].copy_(logits)
    threads(1)
    for view in (strided, padded):
        again = sample(view, top_k=torch.arange(rows) % 3 * 10, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for row in (0, 7, rows - 1):
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
        assert out.draw_logprob[row] <= 1e-6 and (out.draw_logprob[row] > -INF) == bool((x > -INF).any())
        assert 0 <= out.prob[row] <= 1 and 0 <= out.entropy[row] <= math.log(vocabulary) + 1e-5
        assert not any(math.isnan(value[row]) for value in out)


def test_no_rows_are_fine(backend):
    out = sample(torch.zeros(0, 10), backend=backend)
    assert [tuple(value.shape) for value in out] == [(0,)] * 6
    assert [value.dtype for value in out] == [torch.int64] + [torch.float32] * 5


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
    ("banned", [1, 4], TypeError, r"as simsd_kernels.banned_mask\(ids, 5\) makes it, got list"),
    ("banned", torch.tensor([1, 4]), TypeError, r"banned must be torch.int32 \[1\], as .*got torch.int64 \[2\]"),
    ("banned", torch.zeros(5, dtype=torch.bool), TypeError, r"banned must be torch.int32 .*got torch.bool \[5\]"),
    ("banned", torch.zeros(2, dtype=torch.int32), ValueError, r"banned must be torch.int32 \[1\], as .*got .* \[2\]"),
    ("banned", torch.zeros(1, 1, dtype=torch.int32), ValueError, r"banned must be .*got torch.int32 \[1, 1\]"),
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


def test_pieces_of_a_long_row_merge_to_the_statistics_of_float64(backend):
    logits = random_logits(2, 17 * 4096 + 3, seed=1, scale=2.0)
    logits[1, :4096] = -INF
    out = sample(logits, temperature=0.0, backend=backend)
    log_p = logits.double().log_softmax(dim=1)
    torch.testing.assert_close(out.logsumexp.double(), logits.double().logsumexp(dim=1), rtol=1e-6, atol=1e-6)
    entropy = -(log_p.exp() * log_p).nan_to_num(nan=0.0).sum(dim=1)
    torch.testing.assert_close(out.entropy.double(), entropy, rtol=2e-6, atol=0)
    assert torch.equal(out.token, logits.argmax(dim=1))


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
        banned=given["banned"].index_fill(0, torch.tensor(62), -(2**16)) | given["banned"],  # bits of ids from 2000 on
    )
    assert all(map(torch.equal, call(), odd))
    cold = call(temperature=torch.full((4,), -1.0))
    assert torch.equal(cold[0], sample(logits, temperature=0.0, banned=[3], backend="reference").token)
    everything = call(banned=torch.full_like(given["banned"], -1))
    assert everything[0].tolist() == [0] * 4 and everything[1].tolist() == [0.0] * 4


@backends("emulation")
def test_automatic_choice_is_left_to_cpu_tensors():
    good = arguments(torch.zeros(2, 5))
    assert sample_logits(*good, backend="cuda").token.tolist() == sample_logits(*good).token.tolist()
