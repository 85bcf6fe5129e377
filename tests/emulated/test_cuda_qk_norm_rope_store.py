"""The CUDA kernel of qk_norm_rope_store, run on the CPU, against the definition."""

from __future__ import annotations

import json

import pytest
import torch

from test_qk_norm_rope_store import FLOATS, Case, assert_as_modules, random_case

# Head size and rotary columns: whole units of 16 bytes and broken ones, more of them than a warp has lanes.
SIZES = [(128, 128), (128, 64), (64, 64), (64, 16), (256, 256), (256, 2), (256, 0), (80, 80), (80, 24), (96, 48)]
SIZES += [(48, 12), (33, 10), (17, 16), (8, 4), (2, 2), (1, 0), (255, 254), (192, 128)]


def relaid(case: Case, pick) -> Case:
    """Some tensors lie otherwise in memory, so that the 16-byte path is taken by some cases and not by others."""
    if pick(False, True):
        case.q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    if pick(False, True):
        case.k_cache = case.k_cache.transpose(0, 1).contiguous().transpose(0, 1)
    if pick(False, False, True):
        case.v = torch.stack((case.v, case.v), -1)[..., 1]
    if pick(False, False, True):  # rows that begin 2 or 4 bytes past a multiple of 16
        roomy = torch.zeros(*case.k.shape[:3], case.k.shape[3] + 1, dtype=case.k.dtype)[..., 1:]
        case.k = roomy.copy_(case.k)
    if pick(False, False, True):
        case.cos, case.sin = (x[:1].expand(x.shape) for x in (case.cos, case.sin))
    return case


@pytest.mark.parametrize("seed", range(320))
def test_rows_are_normed_turned_and_stored(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    rows = pick(0, 1, 2, 5, 17)
    dim, rotary = pick(*SIZES)
    case = random_case(
        *(pick(1, 2, 3), rows, pick((1, 1), (4, 2), (5, 1), (3, 3), (0, 2), (2, 0)), dim, rotary),
        capacity=rows + pick(0, 1, 9),
        dtype=pick(*FLOATS),
        weights=pick((True, True), (True, True), (False, False), (True, False), (False, True)),
        seed=seed,
    )
    case.slots = torch.where(torch.rand(case.slots.shape, generator=generator) < 0.2, -1, case.slots).int()
    case.eps = pick(0.0, 1e-6, 1e-6, 1e-5, 0.5)
    scale = pick(1, 1, 1e-3, 100)
    case.q, case.k = case.q * scale, case.k * scale
    case = relaid(case, pick)
    before, on_cpu = case.clone(), case.clone()
    out = case.run("cuda")
    assert_as_modules(case, out, before)
    assert_as_modules(case, out, before, (on_cpu.run("cpu"), on_cpu.k_cache, on_cpu.v_cache))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim, rotary", [(128, 128), (256, 64), (64, 0)])
def test_alignment_does_not_change_a_bit(dtype, dim, rotary):
    aligned = random_case(dim=dim, rotary=rotary, dtype=dtype)
    off = aligned.clone()
    roomy = torch.zeros(*off.q.shape[:3], dim + 1, dtype=dtype)[..., 1:]
    off.q = roomy.copy_(off.q)
    assert torch.equal(aligned.run("cuda"), off.run("cuda"))
    assert torch.equal(aligned.k_cache, off.k_cache) and torch.equal(aligned.v_cache, off.v_cache)


def counted(case: Case) -> dict:
    torch.ops.simsd_emulated.take_counters()
    case.run("cuda")
    return json.loads(torch.ops.simsd_emulated.take_counters())


@pytest.mark.parametrize("dim, rotary", [(128, 128), (128, 64), (256, 256)])
def test_one_launch_reads_every_row_once_and_none_without_a_slot(dim, rotary):
    case = random_case(batch=1, rows=3, heads=(4, 2), dim=dim, rotary=rotary, dtype=torch.bfloat16)
    case.slots[0, 1:] = -1
    head, angles = 2 * dim, 2 * 2 * rotary
    normed = 2 * head + angles  # a row, its weight, cos and sin
    counters = counted(case)
    assert counters["launches"] == 1
    assert counters["loaded_bytes"] == (3 * 4 + 2) * normed + 2 * head


@pytest.mark.parametrize("slot", [11, 2**31 - 1, -7])
def test_a_slot_out_of_range_is_skipped(slot):
    case = random_case()
    before = case.clone()
    before.slots[0, 2] = -1
    case.slots[0, 2] = slot
    out = torch.ops.simsd_emulated.qk_norm_rope_store(*case.arguments().values())
    case.slots[0, 2] = -1
    assert_as_modules(case, out, before)


def test_larger_heads_are_refused_by_name():
    case = random_case(dim=258)
    with pytest.raises(RuntimeError, match="cuda: supports head sizes up to 256, got 258"):
        case.run("cuda")
    with pytest.raises(RuntimeError, match="supports head sizes up to 256, got 258"):
        torch.ops.simsd_emulated.qk_norm_rope_store(*case.arguments().values())
