"""The CUDA kernels of grouped_linear, run on the CPU: right, and every row's bits are thin_linear's of its expert."""

from __future__ import annotations

import json

import pytest
import torch

from test_grouped_linear import FLOATS, alone, assert_right, offsets_of, random_case, run

COLUMNS = (1, 5, 15, 16, 17, 31, 33, 70)
INNER = (1, 7, 8, 16, 24, 63, 64, 65, 100, 128, 200, 520, 577, 640)


def drawn(seed):
    """x, weight and offsets, plain or as views that must be read element by element."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    dtype, n, k = pick(*FLOATS), pick(*COLUMNS), pick(*INNER)
    experts = pick(1, 2, 5, 31, 32, 33, 70)  # around the lanes that share them
    share = torch.rand(experts, generator=generator) ** pick(1, 4, 20)  # even, or a few that take most
    share[torch.rand(experts, generator=generator) < pick(0.0, 0.5, 0.9)] = 0
    share[int(torch.randint(experts, (), generator=generator))] += 0.01
    taken = torch.multinomial(share, pick(1, 3, 8, 20, 64, 90), replacement=True, generator=generator)
    x, weight, offsets = random_case(torch.bincount(taken, minlength=experts).tolist(), n, k, dtype, seed)
    match pick(*["plain"] * 4, "padded", "far apart", "column major", "experts far apart", "every other", "offset"):
        case "padded":
            weight = torch.nn.functional.pad(weight, (3, 2))[..., 3:-2]
        case "far apart":  # rows that are aligned, but not packed
            weight = torch.nn.functional.pad(weight, (0, 16))[..., :k]
        case "column major":
            weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
        case "experts far apart":  # by an odd number of elements
            flat = torch.nn.functional.pad(weight.flatten(1), (0, 1), value=float("nan"))
            weight = flat[:, :-1].unflatten(1, (n, k))
        case "every other":
            weight, x = (torch.stack((y, y.new_full(y.shape, float("nan"))), dim=-1)[..., 0] for y in (weight, x))
            offsets = torch.stack((offsets, offsets + 1000), -1)[:, 0]
        case "offset":
            x = torch.cat((x.new_full((1,), float("nan")), x.reshape(-1)))[1:].reshape(x.shape)
    return x, weight, offsets


@pytest.mark.parametrize("seed", range(300))
def test_rows_get_their_experts_product_with_thin_linears_bits(seed):
    x, weight, offsets = drawn(seed)
    out = run(x, weight, offsets, "cuda")
    assert_right(out, x, weight, offsets)
    plain = torch.clone(weight, memory_format=torch.contiguous_format)
    assert torch.equal(out, alone(x.contiguous(), plain, offsets, "cuda"))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_size_of_a_group_changes_a_bit(dtype):
    x, weight, _ = random_case((80,), 33, 200, dtype)
    weight = weight.expand(3, 33, 200).clone()
    weight[[0, 2]] = float("nan")
    whole = run(x, weight, offsets_of((0, 80, 0)), "cuda")
    for rows in (1, 7, 8, 9, 16, 17, 31, 33, 64, 65):
        out = run(x, torch.cat((weight[1:2], weight)), offsets_of((rows, 0, 80 - rows, 0)), "cuda")
        assert torch.equal(out, whole), f"{rows} rows"


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("groups, n", [((5, 0, 3, 1), 2100), ((40, 0, 30), 1600)])
def test_blocks_of_32_columns_give_the_bits_of_blocks_of_16(dtype, groups, n):
    x, weight, offsets = random_case(groups, n, 72, dtype)
    wide = run(x, weight, offsets, "cuda")
    parts = [run(x, part, offsets, "cuda") for part in weight.split(400, dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), wide)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_experts_without_rows_are_not_read(dtype):
    x, weight, offsets = random_case((0, 4, 0, 0, 9, 0, *[0] * 60), 48, 128, dtype)
    torch.ops.simsd_emulated.take_counters()
    out = run(x, weight, offsets, "cuda")
    counters = json.loads(torch.ops.simsd_emulated.take_counters())
    weight[[e for e in range(len(weight)) if e not in (1, 4)]] = float("nan")
    assert torch.equal(run(x, weight, offsets, "cuda"), out)
    assert counters["launches"] == 1
    if dtype != torch.float32:
        # Tiles of 8 rows: expert 1 has one, expert 4 two. 3 blocks of 16 columns each.
        tiles, columns = 3, 3
        bytes_of_weights = tiles * 48 * 128 * 2
        assert counters["async_bytes"] == bytes_of_weights + columns * x.numel() * 2
        assert counters["matrix_products"] == tiles * columns * 128 // 16


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_grid_has_room_for_any_partition_and_does_not_depend_on_it(dtype):
    x, weight, _ = random_case((26,), 20, 64, dtype)
    weight = torch.randn(9, 20, 64).to(dtype)
    blocks = set()
    partitions = [(26, *[0] * 8), (*[0] * 8, 26), (2, *[3] * 8), (*[1] * 8, 18), (9, 0, 8, 0, 9, 0, 0, 0, 0)]
    for groups in partitions:
        given = x, weight, offsets_of(groups)
        assert torch.equal(run(*given, "cuda"), alone(*given, "cuda")), groups
        torch.ops.simsd_emulated.take_counters()
        run(*given, "cuda")
        blocks.add(json.loads(torch.ops.simsd_emulated.take_counters())["blocks"])
    assert len(blocks) == 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_and_infinity_stay_in_their_rows(dtype):
    x, weight, offsets = random_case((9, 0, 11), 40, 100, dtype)
    expected = run(x, weight, offsets, "cuda")
    x[3], x[11, 5], x[19, -1] = float("nan"), float("inf"), float("-inf")
    out = run(x, weight, offsets, "cuda")
    clean = [row for row in range(20) if row not in (3, 11, 19)]
    assert torch.equal(out[clean], expected[clean]) and not out[[3, 11, 19]].isfinite().any()


def test_sizes_that_are_zero():
    for groups, n, k in (((0, 0), 5, 8), ((2, 1), 0, 8), ((), 5, 8)):
        assert run(*random_case(groups, n, k, torch.bfloat16), "cuda").shape == (sum(groups), n)
    for dtype in FLOATS:
        assert torch.equal(run(*random_case((2, 0, 1), 5, 0, dtype), "cuda"), torch.zeros(3, 5, dtype=dtype))


def test_offsets_past_the_rows_end_the_launch():
    x, weight, offsets = random_case((3, 5))
    offsets[-1] = 9
    with pytest.raises(RuntimeError, match="offsets must run from 0 to M and not decrease"):
        torch.ops.simsd_emulated.grouped_linear(x, weight, offsets)


def test_bad_input_is_refused_with_the_words_of_the_cpu():
    x, weight, offsets = random_case((4, 2))
    for bad in ((x, weight[..., :99], offsets), (x, weight[0], offsets), (x.int(), weight, offsets),
                (x, weight.bfloat16(), offsets), (x, weight, offsets.long()), (x, weight, offsets[1:])):  # fmt: skip
        messages = []
        for library in (torch.ops.simsd, torch.ops.simsd_emulated):
            with pytest.raises(RuntimeError) as error:
                library.grouped_linear(*bad)
            messages.append(str(error.value))
        assert messages[0] == messages[1] and messages[0].startswith("grouped_linear: ")
