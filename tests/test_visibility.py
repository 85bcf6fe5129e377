"""Every mask family against an obvious pair-by-pair definition, and the published masks bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simsd_kernels.visibility import (
    INF,
    KNOWN,
    NEVER,
    Visibility,
    check_blocks,
    clean_rows,
    concatenate,
    copy_rows,
    stride_for,
    temporal_rows,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "temporal_masks.json").read_text())["masks"]
few = settings(max_examples=60, deadline=None)


def pairs(queries: int, keys: int, rule: Callable[[int, int], bool]) -> list[list[bool]]:
    return [[bool(rule(i, j)) for j in range(keys)] for i in range(queries)]


def published(labels: list[int], ids: list[int], length: int) -> list[list[bool]]:
    """The released rule, token by token, from the golden file's note."""
    n = len(labels)
    mask_label = length + 1
    kind = [{-1: "pad", 0: "prompt", mask_label: "mask"}.get(label, "data") for label in labels]
    prompt_block = {i: count // length for count, i in enumerate(i for i in range(n) if kind[i] == "prompt")}
    step = dict(enumerate(labels))
    for block in {b for b in ids if b >= 0}:
        data = [labels[i] for i in range(n) if ids[i] == block and kind[i] == "data"]
        masks = [i for i in range(n) if ids[i] == block and kind[i] == "mask"]
        step |= dict(zip(masks, data, strict=False))  # an unpaired mask keeps length + 1: never revealed

    def rule(i: int, j: int) -> bool:
        if "pad" in (kind[i], kind[j]):
            return False
        if kind[j] == "prompt":
            return kind[i] != "prompt" or prompt_block[j] <= prompt_block[i]
        if kind[i] == "prompt" or ids[j] > ids[i]:
            return False
        if ids[j] < ids[i]:
            return kind[j] == "data"
        if kind[i] == "data":
            return step[j] <= step[i] if kind[j] == "data" else step[j] > step[i]
        return step[j] < step[i] if kind[j] == "data" else step[j] >= step[i]

    return pairs(n, n, rule)


@st.composite
def layouts(draw, length: int) -> tuple[list[int], list[int]]:
    """Labels and block ids: left padding, any prompt, committed, drafted, short, early-stopped and padded blocks."""
    labels, ids = [-1] * draw(st.integers(0, 2)), []
    labels += [0] * draw(st.integers(0, 2 * length + 1))
    ids += [-1] * len(labels)
    for block in range(draw(st.integers(0, 3))):
        steps = draw(st.lists(st.integers(1, length), min_size=1, max_size=length))
        reference, mask = steps.copy(), [length + 1] * len(steps)
        holes = draw(st.sets(st.integers(0, len(steps) - 1)))
        match draw(st.sampled_from(["drafted", "committed", "never drafted", "left out", "padding", "known"])):
            case "committed":
                mask = []
            case "never drafted":
                reference = [length + 1 if i in holes else s for i, s in enumerate(steps)]
            case "left out":  # a reference row less for each position never drafted
                reference = [s for i, s in enumerate(steps) if i not in holes]
            case "padding":
                reference = [-1 if i in holes else s for i, s in enumerate(steps)]
                mask = [-1 if i in holes else length + 1 for i in range(len(steps))]
            case "known" if block == 0:
                known = min(holes, default=0)
                reference, mask = [0] * known + steps[known:], mask[known:]
        labels += reference + mask
        ids += [block] * (len(reference) + len(mask))
    padding = draw(st.integers(0, 3))
    return labels + [-1] * padding, ids + [-1] * padding


# --- published masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN, ids=[f"{n}-block{c['block_length']}" for n, c in enumerate(GOLDEN)])
@pytest.mark.parametrize("batched", [False, True], ids=["flat", "batched"])
def test_from_labels_reproduces_the_published_mask(case, batched):
    labels, ids = torch.tensor(case["token_labels"]), torch.tensor(case["block_ids"])
    expected = torch.tensor([[cell == "1" for cell in row] for row in case["visible"]])
    if batched:
        labels, ids, expected = labels.expand(2, -1), ids.expand(2, -1), expected.expand(2, -1, -1)
    assert torch.equal(Visibility.from_labels(labels, ids, case["block_length"]).dense(), expected)


@few
@given(data=st.data(), length=st.sampled_from([1, 2, 3, 4, 8]))
def test_from_labels_follows_the_published_rule_on_any_layout(data, length):
    labels, ids = data.draw(layouts(length))
    visibility = Visibility.from_labels(torch.tensor(labels).long(), torch.tensor(ids).long(), length)
    assert visibility.dense().tolist() == published(labels, ids, length)


@few
@given(data=st.data())
def test_from_labels_treats_each_sequence_of_a_batch_on_its_own(data):
    batch = data.draw(st.lists(layouts(4), min_size=2, max_size=3))
    n = max(len(labels) for labels, _ in batch)
    labels = torch.tensor([labels + [-1] * (n - len(labels)) for labels, _ in batch]).long()
    ids = torch.tensor([ids + [-1] * (n - len(ids)) for _, ids in batch]).long()
    dense = Visibility.from_labels(labels, ids, 4).dense()
    for b in range(len(batch)):
        assert torch.equal(dense[b], Visibility.from_labels(labels[b], ids[b], 4).dense())


def test_from_labels_handles_a_block_of_64():
    steps = torch.randperm(64, generator=torch.Generator().manual_seed(0)) + 1
    labels = [0] * 70 + steps.tolist() + [65] * 64 + [-1] * 2
    ids = [-1] * 70 + [0] * 128 + [-1] * 2
    visibility = Visibility.from_labels(torch.tensor(labels), torch.tensor(ids), 64)
    assert visibility.dense().tolist() == published(labels, ids, 64)


def test_from_labels_takes_block_ids_that_skip_numbers():
    labels, ids = [0, 1, 2, 3, 3, 2, 1, 3, 3], [-1, 7, 7, 7, 7, 90_000, 90_000, 90_000, 90_000]
    assert Visibility.from_labels(torch.tensor(labels), torch.tensor(ids), 2).dense().tolist() == published(
        labels, ids, 2
    )


# --- one family each --------------------------------------------------------------------------------------------------


@few
@given(n=st.integers(0, 20), parameter=st.integers(1, 25))
def test_simple_families_match_their_definition(n, parameter):
    family = {
        "bidirectional": (Visibility.bidirectional(n), lambda i, j: True),
        "causal": (Visibility.causal(n), lambda i, j: j <= i),
        "sliding_window": (Visibility.sliding_window(n, parameter), lambda i, j: i - parameter < j <= i),
        "block_causal": (Visibility.block_causal(n, parameter), lambda i, j: j // parameter <= i // parameter),
    }
    for name, (visibility, rule) in family.items():
        assert visibility.dense().shape == (n, n), name
        assert visibility.dense().tolist() == pairs(n, n, rule), name


@few
@given(n=st.integers(0, 20), length=st.integers(1, 25))
def test_training_rows_see_their_own_noisy_block_and_clean_blocks_before_it(n, length):
    def rule(i: int, j: int) -> bool:
        block, key_block = i % n // length, j % n // length
        if j < n:  # a noisy key
            return i < n and block == key_block
        return key_block < block or (i >= n and key_block == block)

    assert Visibility.training(n, length).dense().tolist() == pairs(2 * n, 2 * n, rule)


@few
@given(data=st.data(), n=st.integers(0, 15))
def test_tree_nodes_see_themselves_and_their_ancestors(data, n):
    order = data.draw(st.permutations(range(n)))  # a parent may come after its child in the list
    parents = [-1] * n
    for k, node in enumerate(order):
        parents[node] = data.draw(st.sampled_from([-1, *order[:k]]))

    def is_ancestor(i: int, j: int) -> bool:
        while i != -1 and i != j:
            i = parents[i]
        return i == j

    assert Visibility.tree(parents).dense().tolist() == pairs(n, n, is_ancestor)


def test_tree_survives_a_chain_deeper_than_the_recursion_limit():
    assert Visibility.tree(range(-1, 2999)).dense().equal(Visibility.causal(3000).dense())


@few
@given(
    length=st.integers(1, 6),
    prefix=st.integers(0, 13),
    copies=st.integers(0, 4),
    pending=st.booleans(),
    spare=st.sampled_from([None, 0, 5]),
)
def test_unrolled_rows_see_the_committed_prefix_and_their_own_copy(length, prefix, copies, pending, spare):
    stride = None if spare is None else stride_for(copies=copies) + spare
    visibility = Visibility.unrolled(copies, length, prefix, pending=pending, stride=stride)
    rows = ["pending"] * (length if pending else 0) + [c for c in range(copies + 1) for _ in range(length)]
    keys = ["prefix"] * prefix + rows

    def rule(i: int, j: int) -> bool:
        return keys[j] in ("prefix", "pending", rows[i])

    assert visibility.dense().tolist() == pairs(len(rows), len(keys), rule)


@few
@given(
    steps=st.lists(st.sampled_from([KNOWN, NEVER, 1, 1, 2, 3, 4, 7]), min_size=1, max_size=6),
    prefix=st.integers(0, 9),
    pending=st.booleans(),
    spare=st.sampled_from([None, 0, 9]),
)
def test_temporal_rows_see_what_the_draft_saw(steps, prefix, pending, spare):
    length, latest = len(steps), max(0, *steps)
    stride = None if spare is None else stride_for(latest) + spare
    visibility = Visibility.temporal(steps, prefix, pending=pending, stride=stride)

    rows = [("clean", 0)] * (length if pending else 0)
    kinds = {KNOWN: "known", NEVER: "dead"}
    rows += [(kinds.get(step, "reference"), step) for step in steps]
    rows += [("mask", latest + 1 if step == NEVER else step) for step in steps if step != KNOWN]
    keys = [("clean", 0)] * prefix + rows

    def rule(i: int, j: int) -> bool:
        (query, at), (key, then) = rows[i], keys[j]
        if "dead" in (query, key):
            return False
        if query == "clean" or key == "clean":
            return key == "clean"
        if query == "known" or key == "known":
            return key == "known"
        match query, key:
            case "reference", "reference":
                return then <= at
            case "reference", "mask":
                return then > at
            case "mask", "reference":
                return then < at
            case _:
                return then >= at

    assert visibility.dense().tolist() == pairs(len(rows), len(keys), rule)


def test_temporal_agrees_with_the_published_labels():
    steps, prefix = [3, 1, 3, 2], 8
    labels = torch.tensor([0] * prefix + steps + [5] * 4)
    ids = torch.tensor([-1] * prefix + [0] * 8)
    whole = Visibility.from_labels(labels, ids, 4).dense()
    assert torch.equal(Visibility.temporal(steps, prefix).dense(), whole[prefix:])


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_design_table():
    block = torch.tensor([[2, 3]])
    assert [v.tolist() for v in clean_rows(block, 10)] == [[[20, 30]], [[20, 30]], [[INF, INF]]]
    assert [v.tolist() for v in copy_rows(4, block, 10)] == [[[25, 35]]] * 3
    assert [v.tolist() for v in copy_rows(4, block, 10, clean=True)] == [[[25, 35]], [[25, 35]], [[INF, INF]]]
    reference, mask = temporal_rows(torch.tensor([1, 4, KNOWN, NEVER]), 3, 10)
    assert [v.tolist() for v in reference] == [[32, 35, 30, -1], [32, 35, 30, INF], [INF, INF, INF, -1]]
    assert [v.tolist() for v in mask] == [[31, 34, -1, 37], [31, 31, INF, 31], [31, 34, -1, 37]]
    every = concatenate(clean_rows(block, 10), copy_rows(0, block, 10))
    assert [v.dtype for v in every] == [torch.int32] * 3 and every[0].shape == (1, 4)


def test_a_later_block_sees_clean_and_reference_rows_only():
    """Lookahead: rows of block b + 1 may follow in the same forward, whatever the stride leaves between."""
    steps, copies = torch.tensor([2, 1, NEVER]), 3
    stride = stride_for(steps=2, copies=copies)
    reference, mask = temporal_rows(steps, 5, stride)
    block = torch.full((2,), 5)
    keys = concatenate(
        reference, mask, copy_rows(copies - 1, block, stride), copy_rows(copies, block, stride, clean=True)
    )
    later = clean_rows(torch.tensor([6]), stride)
    seen = Visibility(later[0], keys[1], keys[2]).dense()[0].tolist()
    assert seen == [True, True, False] + [False] * 3 + [False] * 2 + [True] * 2


def test_stride_and_block_limits():
    assert stride_for(steps=4) == 8 and stride_for(copies=15) == 18 and stride_for(4, 15) == 18
    check_blocks(2**27 - 1, 8)
    with pytest.raises(ValueError, match=r"134217728 blocks of stride 8 reach clock 1073741824.*134217727 blocks fit"):
        check_blocks(2**27, 8)
    with pytest.raises(ValueError, match="below INF"):
        Visibility.temporal([1], 10, stride=2**29)
    with pytest.raises(ValueError, match="below INF"):
        Visibility.from_labels(torch.tensor([1, 2]), torch.tensor([2**28, 0]), 1)


# --- the class --------------------------------------------------------------------------------------------------------


def test_dead_queries_and_keys_see_and_show_nothing():
    dead = torch.tensor([[-1, -1], [INF, INF], [-1, -1]], dtype=torch.int32).unbind(0)
    visibility = Visibility(*concatenate(clean_rows(torch.zeros(2, dtype=torch.int32), 8), dead))
    assert visibility.dense().tolist() == pairs(4, 4, lambda i, j: i < 2 and j < 2)


def test_dense_is_batched_with_its_vectors():
    one = Visibility.causal(3)
    batch = Visibility(*(vector.expand(2, -1) for vector in (one.clock, one.birth, one.death)))
    assert batch.dense().shape == (2, 3, 3) and torch.equal(batch.dense()[1], one.dense())


def test_to_moves_every_vector():
    moved = Visibility.causal(3).to("meta")
    assert {v.device.type for v in (moved.clock, moved.birth, moved.death)} == {"meta"}


def test_show_prints_what_it_returns(capsys):
    picture = Visibility.causal(2).show()
    assert capsys.readouterr().out == picture + "\n"


def test_a_visibility_cannot_be_changed():
    with pytest.raises(AttributeError):
        Visibility.causal(2).clock = torch.zeros(2, dtype=torch.int32)


i32 = {"dtype": torch.int32}


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Visibility([0], [0], [0]), TypeError, "clock must be a tensor, got list"),
        (lambda: Visibility(*(torch.zeros(3),) * 3), TypeError, "clock must be torch.int32, got torch.float32"),
        (lambda: Visibility(*(torch.zeros(1, 1, 3, **i32),) * 3), ValueError, r"clock must be .* got \[1, 1, 3\]"),
        (
            lambda: Visibility(torch.zeros(3, **i32), torch.zeros(4, **i32), torch.zeros(5, **i32)),
            ValueError,
            r"birth \[4\], death \[5\]",
        ),
        (
            lambda: Visibility(torch.zeros(2, 3, **i32), torch.zeros(4, **i32), torch.zeros(4, **i32)),
            ValueError,
            r"clock \[2, 3\], birth \[4\]",
        ),
        (
            lambda: Visibility(torch.zeros(3, **i32, device="meta"), torch.zeros(4, **i32), torch.zeros(4, **i32)),
            ValueError,
            "one device, got clock on meta, birth on cpu",
        ),
        (lambda: Visibility.causal(-1), ValueError, "causal: n must be at least 0 .* got -1"),
        (lambda: Visibility.causal(2.5), TypeError, "causal: n must be an integer, got 2.5"),
        (lambda: Visibility.sliding_window(3, 0), ValueError, "w must be at least 1 .* got 0"),
        (lambda: Visibility.block_causal(3, 0), ValueError, "block_length must be at least 1"),
        (lambda: Visibility.training(3, 0), ValueError, "training: block_length must be at least 1 .* got 0"),
        (lambda: Visibility.training(-1, 4), ValueError, "training: n must be at least 0 .* got -1"),
        (lambda: Visibility.tree([1, 2, 0]), ValueError, "tree: parents has a cycle through node 0"),
        (lambda: Visibility.tree([-1, 1]), ValueError, "cycle through node 1"),
        (lambda: Visibility.tree([-1, 5]), ValueError, r"parents\[1\] must be -1 .* got 5"),
        (lambda: Visibility.temporal([]), ValueError, "steps must be"),
        (lambda: Visibility.temporal([1, -2]), ValueError, r"steps must be .* got \[1, -2\]"),
        (lambda: Visibility.temporal([1.5]), ValueError, "steps must be a list of integers"),
        (lambda: Visibility.temporal([1, 9], stride=12), ValueError, "stride must be at least 13 here, got 12"),
        (lambda: Visibility.unrolled(4, 4, stride=6), ValueError, "stride must be at least 7 here, got 6"),
        (lambda: Visibility.unrolled(-1, 4), ValueError, "copies must be at least 0"),
        (lambda: Visibility.unrolled(1, 4, -4), ValueError, "prefix_length must be at least 0"),
        (lambda: Visibility.from_labels([0], torch.zeros(1), 4), TypeError, "token_labels must be a tensor"),
        (
            lambda: Visibility.from_labels(torch.zeros(1), torch.zeros(1, **i32), 4),
            TypeError,
            "token_labels must be integers, got torch.float32",
        ),
        (
            lambda: Visibility.from_labels(torch.zeros(3, **i32), torch.zeros(4, **i32), 4),
            ValueError,
            r"got \[3\] and \[4\]",
        ),
        (
            lambda: Visibility.from_labels(torch.tensor([6]), torch.tensor([0]), 4),
            ValueError,
            r"-1 \.\. block_length \+ 1 = 5, got 6",
        ),
        (
            lambda: Visibility.from_labels(torch.tensor([2]), torch.tensor([-1]), 4),
            ValueError,
            "needs a block id of 0 or more",
        ),
    ],
)
def test_bad_input_is_named(build, error, message):
    with pytest.raises(error, match=message):
        build()
