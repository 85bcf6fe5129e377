"""benchmarks/gpu/attention_peers.py: others' attention is called as their sources have it, where it is installed."""

from __future__ import annotations

import sys
import time
import types

import pytest
import torch

from benchmarks import contest
from benchmarks.gpu import attention, attention_peers

CPU = torch.device("cpu")


def problem(mask="verify", batch=2, rows=8, keys=32, page=None):
    case = attention.Case(mask, rows, keys, batch, page)
    generator = torch.Generator().manual_seed(0)

    def draw(heads, length):
        return torch.randn(batch, heads, length, attention.DIM, generator=generator)

    sets = [(draw(attention.Q_HEADS, rows), draw(attention.KV_HEADS, keys), draw(attention.KV_HEADS, keys))]
    return attention.Problem(case, sets, *attention.intervals(case, CPU), tiny=True)


def verdicts(made):
    """Every contestant of a case, run as `make gpu` does."""
    bench = contest.Bench(CPU, tiny=True, deadline=time.monotonic() + 60)
    check = contest.near(made.exact(), attention.TOLERANCE, attention.ROW_TOLERANCE)
    row = contest.contest(bench, "case", attention_peers.of(made, check))
    return {name: figures["verdict"] for name, figures in row["contestants"].items()}


def attend(q, k, v, mask):
    """[B, L, H, D] each, bool mask [B, 1, R, K]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attention_peers.sdpa(q, k, v, mask).transpose(1, 2)


@pytest.mark.parametrize("mask, rows, keys", [("verify", 8, 32), ("block-causal", 16, 16), ("causal", 12, 12)])
def test_row_bounds_are_the_mask(mask, rows, keys):
    made = problem(mask, rows=rows, keys=keys)
    last, first = attention_peers.row_bounds(made).unbind(-1)  # [B, 1, K] each
    row = torch.arange(rows)[:, None]
    assert torch.equal((first[:, :, None] <= row) & (row < last[:, :, None]), made.dense())


class Ragged:
    """FlashInfer's wrapper: plan(qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, ...), run(q, k, v)."""

    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD"

    def plan(self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, *, custom_mask, q_data_type):
        assert (num_qo_heads, num_kv_heads, head_dim_qk) == (attention.Q_HEADS, attention.KV_HEADS, attention.DIM)
        self.rows, self.keys = qo_indptr.diff().tolist(), kv_indptr.diff().tolist()
        self.mask = custom_mask.view(len(self.rows), 1, self.rows[0], self.keys[0])
        assert custom_mask.dim() == 1 and q_data_type == torch.float32

    def run(self, q, k, v):
        assert q.shape[0] == sum(self.rows) and k.shape[0] == v.shape[0] == sum(self.keys)
        lanes = (x.unflatten(0, (len(self.rows), -1)) for x in (q, k, v))
        return attend(*lanes, self.mask).flatten(0, 1)


class Paged(Ragged):
    """plan(qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, heads, ..., page_size, ...),
    run(q, (k pages, v pages)), pages [P, Hkv, page, D] in the layout HND."""

    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        assert kv_layout == "HND"

    def plan(self, qo_indptr, kv_indptr, indices, last_page_len, q_heads, kv_heads, dim, page_size, **more):
        assert set(last_page_len.tolist()) == {page_size} and len(indices) == kv_indptr[-1]
        self.table = indices.view(len(last_page_len), -1).long()
        Ragged.plan(self, qo_indptr, kv_indptr * page_size, q_heads, kv_heads, dim, **more)

    def run(self, q, pages):
        k, v = (x[self.table].transpose(1, 2).flatten(2, 3).transpose(1, 2).flatten(0, 1) for x in pages)
        return Ragged.run(self, q, k, v)


def flashmask_attention(query, key, value, startend_row_indices=None, *, causal=False):
    """FlashMask without `causal` and two bounds: a key is hidden from rows >= the first and rows < the second."""
    assert startend_row_indices.dtype == torch.int32 and startend_row_indices.shape[1:] == (1, key.shape[1], 2)
    start, end = startend_row_indices.unbind(-1)
    row = torch.arange(query.shape[1])[:, None]
    hidden = (row >= start[:, :, None]) | (row < end[:, :, None])
    return attend(query, key, value, ~hidden)


def flash_attn_func(q, k, v, softmax_scale=None, causal=False, **_):
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    mask = mask.tril(k.shape[1] - q.shape[1]) if causal else mask
    return attend(q, k, v, mask)


@pytest.fixture
def everything_installed(monkeypatch):
    flashinfer = {"BatchPrefillWithRaggedKVCacheWrapper": Ragged, "BatchPrefillWithPagedKVCacheWrapper": Paged}
    given = {
        "flashinfer": flashinfer,
        "flashmask_interface": {"flashmask_attention": flashmask_attention},
        "flash_attn": {"flash_attn_func": flash_attn_func},
        "flash_attn_interface": {"flash_attn_func": flash_attn_func},
        "flash_attn.cute": {"flash_attn_func": lambda *given, **more: (flash_attn_func(*given, **more), None)},
    }
    for name, contents in given.items():
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(attention_peers, "WORKSPACE_BYTES", 64)


@pytest.mark.parametrize("mask, rows, keys", [("verify", 8, 32), ("block-causal", 16, 16), ("causal", 16, 16)])
def test_installed_peers_are_right(everything_installed, mask, rows, keys):
    found = verdicts(problem(mask, rows=rows, keys=keys))
    masked = {"flashinfer, custom mask", "flashmask"} if mask != "causal" else set()
    masked |= {f"flash-attn {n} causal" for n in "234"} if mask == "causal" else set()
    assert masked and all(found[name] == contest.RIGHT for name in masked), found
    assert set(found.values()) <= {contest.RIGHT, contest.UNCHECKED}, found


def test_installed_paged_peer_is_right(everything_installed):
    made = problem(page=16)
    bench = contest.Bench(CPU, tiny=True, deadline=time.monotonic() + 60)
    check = contest.near(made.exact(), attention.TOLERANCE, attention.ROW_TOLERANCE)
    row = contest.contest(bench, "case", attention.paged(bench, made, check))
    assert row["contestants"]["flashinfer, custom mask"]["verdict"] == contest.RIGHT


def test_peers_that_are_not_installed_say_so():
    found = verdicts(problem())
    names = ("flashinfer, custom mask", "flashmask", "flash-attn without a mask (other result)")
    assert [found[name] for name in names] == ["not installed"] * 3


def test_flex_attention_is_compiled_for_one_shape_only():
    flex = [case for case in attention.cases(tiny=False) if case.flex]
    assert len(flex) == 1 and len({(case.rows, case.keys, case.batch) for case in flex}) == 1
