"""The CUDA kernel of thin_linear, run on the CPU: right, and no row notices anything but itself."""

from __future__ import annotations

import json

import pytest
import torch

import simsd_kernels
from test_thin_linear import random_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 63, 64, 65, 90)  # around the tiles of 8, 16, 32 and 64
COLUMNS = (1, 5, 15, 16, 17, 31, 32, 33, 70)
# Whole pieces of 16 bytes, whole chunks, one chunk more than there are warps, several rounds of chunks; and not.
INNER = (1, 7, 8, 16, 24, 32, 63, 64, 65, 72, 100, 128, 200, 512, 520, 577, 640, 1100)


def linear(x, weight, backend="cuda"):
    return simsd_kernels.thin_linear(x, weight, backend=backend)


def drawn(seed):
    """x and weight, plain or as views that must be read element by element."""
    generator = torch.Generator().manual_seed(seed)

    def pick(choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    dtype, rows, n, k = pick(DTYPES), pick(ROWS), pick(COLUMNS), pick(INNER)
    x, weight = random_case((rows,), n, k, dtype, seed)
    match pick(["plain"] * 4 + ["padded", "far apart", "column major", "every other", "offset"]):
        case "padded":
            weight = torch.nn.functional.pad(weight, (3, 2))[:, 3:-2]
        case "far apart":  # rows that are aligned, but not packed
            weight = torch.nn.functional.pad(weight, (0, 16))[:, :k]
        case "column major":
            weight = weight.T.contiguous().T
        case "every other":
            weight, x = (torch.stack((y, y.new_full(y.shape, float("nan"))), dim=-1)[..., 0] for y in (weight, x))
        case "offset":
            x = torch.cat((x.new_full((1,), float("nan")), x.reshape(-1)))[1:].reshape(x.shape)
    return x, weight


@pytest.mark.parametrize("seed", range(300))
def test_it_is_the_linear_layer_and_rows_are_alone(seed):
    x, weight = drawn(seed)
    got = linear(x, weight)
    exact = x.double() @ weight.double().T
    # No sum of K float32 terms errs by more; then the result is rounded once.
    magnitude = x.double().abs() @ weight.double().abs().T
    bound = x.shape[1] * torch.finfo(torch.float32).eps * magnitude + torch.finfo(x.dtype).eps * exact.abs()
    for out in (got, linear(x, weight, "cpu"), linear(x, weight, "reference")):
        assert out.dtype == x.dtype and ((out.double() - exact).abs() <= bound).all()

    plain = torch.clone(weight, memory_format=torch.contiguous_format)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    assert torch.equal(linear(x[order].contiguous(), plain), got[order]), "order, strides"
    count = int(torch.randint(1, len(x) + 1, (), generator=generator))
    assert torch.equal(linear(x[-count:], plain), got[-count:]), "number of rows"
    row = int(order[0])
    first = int(torch.randint(len(weight), (), generator=generator))
    alone = linear(x[row].contiguous(), plain[first : first + 1].clone())
    assert torch.equal(alone, got[row, first : first + 1]), "alone"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_number_of_rows_changes_a_bit(dtype):
    x, weight = random_case((130,), 33, 584, dtype)
    alone = torch.cat([linear(row, weight) for row in x[:70].split(1)])
    for rows in (*range(1, 71), 128, 130):
        got = linear(x[:rows], weight)
        assert torch.equal(got[:70], alone[:rows]), f"{rows} rows"


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("rows, n", [(1, 8200), (8, 8192), (9, 3100), (31, 3072), (64, 3073), (70, 3072)])
def test_blocks_of_32_columns_give_the_bits_of_blocks_of_16(dtype, rows, n):
    x, weight = random_case((rows,), n, 136, dtype)
    wide = linear(x, weight)
    assert torch.equal(torch.cat([linear(x, part) for part in weight.split(1024)], dim=1), wide)
    assert torch.equal(linear(x, torch.nn.functional.pad(weight, (1, 0))[:, 1:]), wide), "element by element"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [72, 100])
def test_nan_and_infinity_stay_in_their_rows_and_columns(dtype, k):
    x, weight = random_case((20,), 40, k, dtype)
    expected = linear(x, weight)
    x[3], x[11, 5], x[19, -1] = float("nan"), float("inf"), float("-inf")
    weight[7], weight[39, 0] = float("nan"), float("inf")
    got = linear(x, weight)
    clean_rows = [i for i in range(20) if i not in (3, 11, 19)]
    clean_columns = [i for i in range(40) if i not in (7, 39)]
    assert torch.equal(got[clean_rows][:, clean_columns], expected[clean_rows][:, clean_columns])
    assert not got[[3, 11, 19]].isfinite().any() and not got[:, [7, 39]].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_weight_is_read_once_and_products_serve_eight_rows(dtype):
    """Per block of 16 columns: the weight once, x once; a product per 16 k, 16 columns and 8 rows."""
    for rows, tiles in ((1, 1), (8, 1), (16, 2), (32, 4), (64, 8)):
        x, weight = random_case((rows,), 48, 1024, dtype)
        torch.ops.simsd_emulated.take_counters()
        linear(x, weight)
        counters = json.loads(torch.ops.simsd_emulated.take_counters())
        assert counters["launches"] == 1 and counters["blocks"] == 3
        assert counters["async_bytes"] == weight.numel() * 2 + 3 * x.numel() * 2
        assert counters["matrix_products"] == 3 * 64 * tiles


def test_sizes_that_are_zero():
    for shape, n, k in (((0,), 5, 8), ((3,), 0, 8), ((2, 0), 5, 8), ((0,), 0, 0)):
        assert linear(*random_case(shape, n, k, torch.bfloat16)).shape == (*shape, n)
    for dtype in DTYPES:
        assert torch.equal(linear(*random_case((3,), 5, 0, dtype)), torch.zeros(3, 5, dtype=dtype))


def test_bad_input_is_refused_with_the_words_of_the_cpu():
    x, weight = random_case((4,), 33, 100)
    for bad in ((x, weight[:, :99]), (x, weight[0]), (x.int(), weight), (x, weight.bfloat16()), (x.sum(), weight)):
        messages = []
        for library in (torch.ops.simsd, torch.ops.simsd_emulated):
            with pytest.raises(RuntimeError) as error:
                library.thin_linear(*bad)
            messages.append(str(error.value))
        assert messages[0] == messages[1] and messages[0].startswith("thin_linear: ")
