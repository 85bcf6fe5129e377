"""The CUDA kernels take a row in pieces: odd ones, many, and how often each is read."""

import math

import pytest
import torch

from backends import backends, compiled, each_dtype
from logits import INF, random_logits, sample

OP = "sample_logits"
STATISTICS = ("prob", "log_odds", "entropy", "logsumexp", "draw_logprob")


@backends("cuda")
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_many_rows_at_once_are_drawn_as_few_are(backend, temperature):
    logits = random_logits(450, 10 * 1024, dtype=torch.bfloat16)  # so many that a warp takes several pieces of a row
    settings = {"temperature": temperature, "seed": 3, "banned": [7, 5000], "backend": backend}
    together = sample(logits, **settings)
    for first in (0, 200, 440):
        rows = slice(first, first + 10)
        apart = sample(logits[rows], position=torch.arange(450)[rows], **settings)
        assert all(torch.equal(one[rows], other) for one, other in zip(together, apart, strict=True))


EXTREMES = {
    "huge": [1e31, 9e30, -1e31, 5.0],
    "huge and falling": [-1e31, -2e31, -3e38, -INF],
    "tiny": [1e-35, -1e-35, 3e-39, 0.0],
    "one finite": [2.0, -INF, math.nan, -INF],
    "the least finite of float16": [-65504.0, -65504.0, -60000.0, -INF],
    "the largest of float16": [65504.0, 65000.0, INF, -65504.0],
}


@compiled
@each_dtype
@pytest.mark.parametrize("values", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1e-7, 1e7])
def test_pieces_of_extreme_numbers_are_what_the_definition_makes_of_them(backend, dtype, values, temperature):
    logits = torch.full((1, 3072), -INF)
    logits[0, 1024:2048] = torch.tensor(values).repeat(256)  # the middle of three pieces is nothing else
    logits[0, 2100] = values[3]
    settings = {"temperature": temperature, "seed": 11}
    out, expected = (sample(logits.to(dtype), backend=one, **settings) for one in (backend, "reference"))
    assert torch.equal(out.token, expected.token)
    for name in STATISTICS:
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=1e-5, atol=1e-5, msg=name)


@backends("cuda")
@each_dtype
@pytest.mark.parametrize("offset", [0, 1, 8, 31, 256, 1023])
def test_ties_of_the_largest_go_to_the_lowest_id_wherever_they_lie(backend, dtype, offset):
    logits = random_logits(4, 2048, dtype=dtype, scale=0.5)
    for row, other in enumerate((offset + 1, offset + 7, offset + 300, 2047)):
        logits[row, [offset, other]] = 6.0
    out, expected = (sample(logits, temperature=0.0, backend=one) for one in (backend, "reference"))
    assert out.token.tolist() == [offset] * 4
    torch.testing.assert_close(out.entropy, expected.entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.log_odds, expected.log_odds, rtol=1e-5, atol=1e-5)


@backends("emulation")
@each_dtype
def test_an_aligned_row_without_filters_is_read_once_and_again_only_where_noise_may_win(counted, dtype):
    logits = random_logits(3, 5000, dtype=dtype)
    row_bytes = 5000 * dtype.itemsize
    for temperature, most in ((0.0, 1.0), (1.0, 1.5), (0.7, 1.5)):
        counters = counted(lambda heat=temperature: sample(logits, temperature=heat, backend="cuda"))
        assert 3 * row_bytes <= counters["loaded_bytes"] <= most * 3 * row_bytes and counters["launches"] == 2
    one = counted(lambda: sample(logits[1:2], top_k=20, position=torch.tensor([1]), backend="cuda"))
    three = counted(lambda: sample(logits, top_k=torch.tensor([0, 20, 0]), backend="cuda"))
    others = counted(lambda: sample(logits[::2], position=torch.tensor([0, 2]), backend="cuda"))
    assert three["loaded_bytes"] == others["loaded_bytes"] + one["loaded_bytes"]


@backends("emulation")
def test_a_filter_reads_segments_that_cannot_matter_once_more_at_most(counted):
    logits = random_logits(1, 64 * 1024) - 20.0
    logits[0, 5000:5064] += 40.0  # one segment has all that top-k keeps
    assert counted(lambda: sample(logits, top_k=50, backend="cuda"))["loaded_bytes"] < 2.1 * logits.numel() * 4
