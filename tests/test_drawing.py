"""Pictures: the terminal's characters exactly, and that picture files come out and say why when they cannot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from simsd_kernels import drawing
from simsd_kernels.visibility import KNOWN, NEVER, Visibility


def test_terminal_draws_rows_as_queries_and_columns_as_keys():
    assert drawing.terminal(Visibility.causal(3), width=80) == "  0 1 2\n0 ██· ·\n1 ████·\n2 ██████"


def test_terminal_labels_the_temporal_layout():
    steps = [KNOWN, 2, NEVER]
    picture = drawing.terminal(Visibility.temporal(steps, 3), drawing.temporal_labels(steps, 3), width=80)
    assert picture.splitlines() == [
        "                   x x x │x │x x │□ □",
        "                   0 1 2 │3 │4 5 │4 5",
        "known     x3       ██████│██│· · │· ·",
        "reference x4 t2    ██████│██│██· │· ██",
        "          x5 never · · · │· │· · │· ·",
        "mask      □4 t2    ██████│██│· · │████",
        "          □5 never ██████│██│██· │· ██",
    ]


def test_terminal_packs_two_rows_into_a_line_where_space_is_short():
    visibility, labels = Visibility.unrolled(1, 2, 2), drawing.unrolled_labels([[True, False]], 2, 2)
    assert drawing.terminal(visibility, labels, width=21).splitlines() == [
        "copy 0     ██│██│··",
        "clean copy ██│··│██",
    ]


def test_terminal_says_what_to_do_about_a_mask_that_is_too_wide():
    with pytest.raises(ValueError, match=r"100 keys need 102 columns, the terminal has 80: .* --out"):
        drawing.terminal(Visibility.causal(100), width=80)


def test_terminal_draws_each_sequence_of_a_batch():
    one = Visibility.causal(1)
    batch = Visibility(*(vector.expand(2, -1) for vector in (one.clock, one.birth, one.death)))
    assert drawing.terminal(batch, width=80) == "sequence 0\n  0\n0 ██\n\nsequence 1\n  0\n0 ██"


def test_terminal_draws_an_empty_mask():
    assert drawing.terminal(Visibility.causal(0), width=80) == ""


def test_labels_must_fit_the_mask():
    with pytest.raises(ValueError, match="the mask is 3 x 3, the labels 2 x 2"):
        drawing.terminal(Visibility.causal(3), drawing.numbered(Visibility.causal(2)), width=80)


@pytest.mark.parametrize("pending", [False, True], ids=["", "pending"])
@pytest.mark.parametrize("prefix", [0, 5])
def test_labels_cover_the_layouts(prefix, pending):
    steps = [KNOWN, 1, 3, NEVER]
    drawing.terminal(
        Visibility.temporal(steps, prefix, pending=pending), drawing.temporal_labels(steps, prefix, pending), width=200
    )
    drawing.terminal(
        Visibility.unrolled(2, 4, prefix, pending=pending), drawing.unrolled_labels(2, 4, prefix, pending), width=200
    )


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_save_writes_a_picture(tmp_path: Path, suffix, magic):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"mask{suffix}"
    steps = [KNOWN, 2, NEVER, 1]
    drawing.save(Visibility.temporal(steps, 4), path, drawing.temporal_labels(steps, 4), title="temporal")
    assert path.read_bytes().startswith(magic)


def test_save_draws_masks_without_labels_of_any_size(tmp_path: Path):
    pytest.importorskip("matplotlib")
    for n in (0, 3, drawing.MAX_LABELLED + 1):
        drawing.save(Visibility.sliding_window(n, 2), tmp_path / f"{n}.png")
        assert (tmp_path / f"{n}.png").stat().st_size > 0


def test_the_same_mask_gives_the_same_svg(tmp_path: Path):
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    for path in (first, second):
        drawing.save(Visibility.causal(3), path)
    assert first.read_bytes() == second.read_bytes()


def test_save_names_the_allowed_suffixes(tmp_path: Path):
    with pytest.raises(ValueError, match=r"must end in .png, .svg, .pdf, got '.*mask.bmp'"):
        drawing.save(Visibility.causal(3), tmp_path / "mask.bmp")


def test_save_refuses_a_batch(tmp_path: Path):
    pytest.importorskip("matplotlib")
    vectors = (torch.zeros(2, 3, dtype=torch.int32),) * 3
    with pytest.raises(ValueError, match="got a batch of 2"):
        drawing.save(Visibility(*vectors), tmp_path / "mask.png")


def test_save_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "simsd-kernels\[plot\]"'):
        drawing.save(Visibility.causal(3), tmp_path / "mask.png")
    assert not (tmp_path / "mask.png").exists()
