"""What `thin_linear` on CUDA does for the products of SDAR-8B, counted: benchmarks/cpu/linear_counts.py."""

from __future__ import annotations

import pytest

from benchmarks.cpu import linear_counts


@pytest.fixture(scope="module")
def found() -> list[linear_counts.Count]:
    return list(linear_counts.count())


def test_no_product_is_made_of_rows_that_are_not_there(found):
    for one in found:
        n, k = linear_counts.PRODUCTS[one.product]
        assert one.products == one.rows * n * k // (16 * 8 * 16), one


def test_most_multiprocessors_have_a_block(found):
    for one in found:
        assert 3 * one.blocks >= 2 * linear_counts.MULTIPROCESSORS, one


def test_little_is_copied_twice(found):
    """Against the least, and against tiles of 128 x 128, where there are rows enough for them."""
    for one in found:
        least, blas = {16: (1.5, 1.35), 64: (3, 2), 256: (6, 1.5), 2048: (21, 1)}[one.rows]
        assert one.copied_mb <= least * one.least_mb, one
        assert one.copied_mb <= blas * one.blas_mb, one
        assert one.copied_mb <= one.copied_mb_before + 1, one


def test_a_wide_tile_makes_much_of_what_it_copies(found):
    for one in found:
        assert one.products_per_kb >= {16: 2.6, 64: 5.3, 256: 10.6, 2048: 16}[one.rows], one
