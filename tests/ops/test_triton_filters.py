"""Top-k and top-p of the Triton kernels keep what the definition keeps, id by id."""

from __future__ import annotations

import math

import pytest
import torch

from backends import backends
from logits import INF, arguments, random_case, random_logits
from simsd_kernels.banned import is_banned
from simsd_kernels.sample_logits import reference

OP = "sample_logits"
CHUNK = 4096
pytestmark = backends("triton")


def kept(logits, temperature=1.0, top_k=0, top_p=1.0, banned=None, **_):
    """Boolean [R, V]: what the cutoffs of the kernels keep, and what the definition does."""
    _, temperature, top_k, top_p, *_, mask = arguments(logits, temperature, top_k, top_p, banned=banned)
    x = reference.scale(logits, temperature, is_banned(mask, logits.shape[1], logits.device))
    from simsd_kernels.sample_logits.triton import scan

    _, _, cutoff = scan(logits[:, None], mask, None, None, temperature, top_k, top_p, None, None, None)
    bits = torch.where(x == 0, 0.0, x).view(torch.int32)
    key, ids = bits ^ ((bits >> 31) & 0x7FFFFFFF), torch.arange(logits.shape[1])
    last_key, last_id = cutoff[:, :1], cutoff[:, 1:]
    inside = (x > -INF) & ((key > last_key) | ((key == last_key) & (ids <= last_id)))
    expected = reference.keep(x, top_k, top_p)
    return inside, torch.where((temperature > 0)[:, None], expected, x > -INF)


@pytest.mark.parametrize("number", range(1000, 1044))
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
