"""What host and device tell each other in an iteration: rows of numbers made by hand, read as what they say."""

from __future__ import annotations

import pytest
import torch

from simsd.decode import exchange
from simsd.decode.exchange import ORIGINS, Block, Commands, Report
from simsd_kernels.advance_slots.arguments import COLUMNS, HEAD
from simsd_kernels.verify_graph.api import DENOISED
from simsd_kernels.verify_graph.api import DRAFTED as DRAFTED_BY_WALK

LENGTH, LOOKAHEAD = 4, 2  # room for four blocks


def header(**values: int) -> list[int]:
    """As `advance_slots` documents it."""
    names = ["epoch", "runs", "finished", "taken", "step", "judged", "accepted", "states"]
    names += ["failed", "ended", "low", "high", "maskeds", "depth", "lag", "forwards"]
    assert not values.keys() - set(names)
    return [values.get(name, 0) for name in names]


def report_of(*rows: list[int], lookahead: int = LOOKAHEAD, length: int = LENGTH) -> Report:
    """Rows of a header, then tokens 1, 2, ...; steps 101, ...; probabilities 1/2, 1/4, ...; log-probabilities of draws
    -1, -2, ...; origins 0, 1, 0, 1, ..."""
    text = (lookahead + 2) * length
    report = Report.allocate(len(rows), lookahead, length, "cpu")
    probs = torch.tensor([2.0 ** -(i % 30 + 1) for i in range(text)]).view(torch.int32).tolist()
    logprobs = (-torch.arange(1.0, text + 1)).view(torch.int32).tolist()
    for n, row in enumerate(rows):
        blocks = [*range(1, text + 1), *range(101, 101 + text), *probs, *logprobs, *([0, 1] * text)[:text]]
        report.buffer[n] = torch.tensor(row + blocks, dtype=torch.int32)
    return report


def test_numbers_of_origins_are_those_that_the_ops_write():
    assert (ORIGINS[0], ORIGINS[DENOISED], ORIGINS[DRAFTED_BY_WALK]) == ("known", "denoised", "drafted")
    assert [ORIGINS[getattr(exchange, name.upper())] for name in ORIGINS[2:]] == list(ORIGINS[2:])
    assert (Report.HEADER, Report.COLUMNS) == (HEAD, COLUMNS)


def test_several_finished_blocks_come_in_order_and_the_current_one_as_far_as_it_is_revealed():
    row = header(epoch=9, runs=1, finished=2, taken=5, judged=7, accepted=6, states=3, low=0b1010, maskeds=2, depth=1)
    [(slot, got)] = report_of(row).read()
    assert slot == 0 and got.epoch == 9
    first = Block([1, 2, 3, 4], [101, 102, 103, 104], [0.5, 0.25, 0.125, 0.0625], [-1, -2, -3, -4], [0, 1, 0, 1])
    assert got.blocks[0] == first
    assert got.blocks[1].draw_logprobs == [-5, -6, -7, -8]
    assert (got.blocks[1].tokens, got.blocks[1].probs[0]) == ([5, 6, 7, 8], 2.0**-5) and len(got.blocks) == 2
    assert got.provisional == [None, 10, None, 12]
    assert (got.taken, got.judged, got.accepted, got.states) == (5, 7, 6, 3)
    assert (got.self_draftable, got.proposed, got.failed, got.ended) == (2, 1, False, False)


def test_as_many_blocks_may_finish_as_were_drafted_and_one_more():
    [(_, got)] = report_of(header(runs=1, finished=3)).read()
    assert [block.tokens[0] for block in got.blocks] == [1, 5, 9] and got.provisional == [None] * 4


def test_slots_that_took_no_part_are_left_out():
    rows = [header(epoch=1), header(epoch=2, runs=1), header(epoch=3), header(epoch=4, runs=1, finished=1)]
    assert [(slot, got.epoch, len(got.blocks)) for slot, got in report_of(*rows).read()] == [(1, 2, 0), (3, 4, 1)]


@pytest.mark.parametrize(("failed", "ended"), [(1, 0), (0, 1), (1, 1)])
def test_a_failed_sequence_and_an_ended_one_are_told_apart(failed, ended):
    [(_, got)] = report_of(header(runs=1, failed=failed, ended=ended)).read()
    assert (got.failed, got.ended) == (bool(failed), bool(ended))


def test_columns_that_the_iteration_adds_are_read_where_they_are_written():
    report = report_of(header(runs=1), header(runs=1))
    report.draft_lag.copy_(torch.tensor([4, 8]))
    report.draft_forwards.copy_(torch.tensor([11, 12]))
    report.finished[1] = 1
    got = [(one.draft_lag, one.draft_forwards, len(one.blocks)) for _, one in report.read()]
    assert got == [(4, 11, 0), (8, 12, 1)]


@pytest.mark.parametrize("revealed", [1 << 63, (1 << 63) | 1, (1 << 31) | (1 << 32), (1 << 64) - 1 - (1 << 40), 0])
def test_a_set_of_64_positions_comes_whole(revealed):
    words = [word - (1 << 32) if word >> 31 else word for word in (revealed & 0xFFFFFFFF, revealed >> 32)]
    [(_, got)] = report_of(header(runs=1, low=words[0], high=words[1]), length=64).read()
    assert got.provisional == [i + 1 if revealed >> i & 1 else None for i in range(64)]


def temporal(finished: int, revealed: int, length: int = LENGTH) -> Report:
    """Slot 1 of two, as a temporal iteration writes it."""
    report = Report.allocate(2, 1, length, "cpu")
    report.buffer.fill_(77)  # what an iteration before left there
    ints = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    tokens = torch.arange(10, 10 + length).repeat(2, 1)
    report.write(
        live=torch.tensor([False, True]),
        epoch=ints(3, 4),
        finished=ints(0, finished),
        judged=ints(0, 3),
        accepted=ints(0, 2),
        failed=torch.tensor([False, False]),
        ended=torch.tensor([False, bool(finished)]),
        revealed=torch.tensor([0, revealed]),
        tokens=tokens,
        steps=(tokens - 9).int(),
        prob=torch.full((2, length), 0.5),
        draw_logprob=torch.full((2, length), -0.25),
        origin=torch.full((2, length), 4, dtype=torch.int32),
        logprob=torch.full((2, length), -0.75),
    )
    report.draft_lag.zero_()
    report.draft_forwards.copy_(ints(0, 6))
    return report


def test_a_temporal_block_comes_as_far_as_it_is_committed():
    [(slot, got)] = temporal(finished=0, revealed=0b11).read(partly=True)
    assert got.blocks == [Block([10, 11], [1, 2], [0.5, 0.5], [-0.25, -0.25], [4, 4], [-0.75, -0.75])]
    assert (slot, got.epoch, got.provisional) == (1, 4, [10, 11, None, None])
    assert (got.taken, got.judged, got.accepted, got.states, got.ended) == (1, 3, 2, 2, False)
    assert (got.self_draftable, got.proposed, got.draft_lag, got.draft_forwards) == (0, 0, 0, 6)


def test_a_finished_temporal_block_comes_whole():
    [(_, got)] = temporal(finished=1, revealed=0).read(partly=True)
    assert got.blocks[0].tokens == [10, 11, 12, 13] and got.blocks[0].logprobs == [-0.75] * 4
    assert got.ended


@pytest.mark.parametrize("count", [31, 32, 33, 63])
def test_a_temporal_block_of_64_comes_as_far_as_it_is_committed(count):
    [(_, got)] = temporal(finished=0, revealed=(1 << count) - 1, length=64).read(partly=True)
    assert got.blocks[0].tokens == list(range(10, 10 + count))
    assert got.provisional == [*range(10, 10 + count), *[None] * (64 - count)]


def test_a_report_of_fewer_drafted_blocks_lies_in_the_same_memory():
    report = Report.allocate(2, LOOKAHEAD, LENGTH, "cpu")
    less = report.of(0)
    assert (report.buffer.shape, less.buffer.shape) == ((2, 16 + 5 * 16), (2, 16 + 5 * 8))
    less.buffer[:, 0] = 5
    assert report.buffer[:, 0].tolist() == [5, 5]
    host = Report.allocate(2, LOOKAHEAD, LENGTH, "cpu")
    host.copy(report)
    report.buffer.zero_()
    assert host.of(0).buffer[:, 0].tolist() == [5, 5]


def test_a_copy_takes_logarithms_along():
    device = temporal(finished=1, revealed=0)
    host = Report.allocate(2, 1, LENGTH, "cpu")
    host.copy(device)
    assert list(host.read(partly=True)) == list(device.read(partly=True))


def test_commands_are_written_by_slot_and_copied_whole():
    host, device = Commands(3, "cpu"), Commands(3, "cpu")
    given = {"runs": [1, 0, 1], "mode": [2, 0, 1], "depth": [3, 0, 0], "row_budget": [9, 8, 7]}
    given |= {"peeks": [1, 1, 0], "head": [0, 1, 0]}
    given |= {"calibration": [0.5, 1.0, 0.25], "min_visit_prob": [0.125, 0.0, 1.0]}
    host.write(**given)
    device.copy(host)
    host.write(**{name: [0] * 3 for name in given})
    assert {name: getattr(device, name).tolist() for name in given} == given
    assert not any(getattr(host, name).any() for name in given)
