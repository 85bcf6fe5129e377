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
        assert 3 * row_bytes <= counters["loaded_bytes"] <= most * 3 * row_bytes and counters["launches"] == 3
    one = counted(lambda: sample(logits[1:2], top_k=20, position=torch.tensor([1]), backend="cuda"))
    three = counted(lambda: sample(logits, top_k=torch.tensor([0, 20, 0]), backend="cuda"))
    others = counted(lambda: sample(logits[::2], position=torch.tensor([0, 2]), backend="cuda"))
    assert three["loaded_bytes"] == others["loaded_bytes"] + one["loaded_bytes"]


@backends("emulation")
def test_a_filter_reads_segments_that_cannot_matter_once_more_at_most(counted):
    logits = random_logits(1, 64 * 1024) - 20.0
    logits[0, 5000:5064] += 40.0  # one segment has all that top-k keeps
    assert counted(lambda: sample(logits, top_k=50, backend="cuda"))["loaded_bytes"] < 2.1 * logits.numel() * 4


@backends("cuda")
@each_dtype
def test_rows_that_many_blocks_filter_are_bit_by_bit_those_that_one_does(backend, dtype):
    """Some of them many ids share the cutoff's x of, in more than one block's share."""
    kinds = torch.cat((random_logits(3, 10 * 1024 - 8), torch.zeros(1, 10 * 1024 - 8))).to(dtype)
    logits, count = kinds.repeat(80, 1), 320  # of one block each, where there are 264 of them
    top_k, top_p = (torch.tensor(values).repeat(40) for values in ([0, 50, 0, 3, 900, 0, 1, 0], [0.9, 1.0] * 4))
    settings = {"temperature": 0.8, "seed": 5, "backend": backend}
    together = sample(logits, top_k=top_k, top_p=top_p, **settings)
    for row in (*range(8), count - 1):  # alone, of two blocks
        one = slice(row, row + 1)
        alone = sample(logits[one], top_k=top_k[one], top_p=top_p[one], position=torch.tensor([row]), **settings)
        assert all(torch.equal(many[one], few) for many, few in zip(together, alone, strict=True)), row
    expected = sample(logits[:8], top_k=top_k[:8], top_p=top_p[:8], **{**settings, "backend": "cpu"})
    assert torch.equal(together.token[:8].cpu(), expected.token)
    torch.testing.assert_close(together.draw_logprob[:8].cpu(), expected.draw_logprob, rtol=5e-6, atol=5e-6)


@backends("emulation")
@pytest.mark.parametrize("schedule", range(1, 5))
def test_order_of_blocks_does_not_matter_to_what_they_filter_together(schedule):
    logits = random_logits(3, 30 * 1024).bfloat16()
    settings = {"top_k": torch.tensor([0, 700, 0]), "top_p": torch.tensor([0.95, 1.0, 1.0]), "backend": "cuda"}
    expected = sample(logits, **settings)
    torch.ops.simsd_emulated.set_schedule(schedule)
    try:
        out = sample(logits, **settings)
    finally:
        torch.ops.simsd_emulated.set_schedule(0)
    assert all(map(torch.equal, out, expected))


@backends("emulation")
@pytest.mark.parametrize("rows, blocks", [(1, 19), (8, 8 * 19), (14, 264)])
def test_few_rows_are_filtered_by_as_many_blocks_as_they_have_work_for(counted, rows, blocks):
    logits = random_logits(rows, 151_936) - 20.0
    logits[:, 5000:5064] += 40.0
    of_scan = rows * min(38, -(-149 // (4 * max(rows * 149 // 2048, 1))))
    counters = counted(lambda: sample(logits, top_k=50, backend="cuda"))
    assert counters["blocks"] == of_scan + rows + blocks
    # What decides is in one segment: the first pass reads the row, the others that segment.
    assert counters["loaded_bytes"] < 2.1 * logits.numel() * 4
