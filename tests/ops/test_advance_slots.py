"""What the slots hold after a walk, and what the host is told of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advances import DTYPES, ORDER, WRITTEN, advance, batch_of, finished, random_case, replay, slot
from arguments import copy_of, same_bits, strided
from backends import backends, callable_of, compiled, needs_compiled_ops
from simsd_kernels import dispatch
from simsd_kernels.advance_slots import reference
from simsd_kernels.advance_slots.arguments import HEAD, NO_END

advance_slots = callable_of("advance_slots")
LANES = tuple(ORDER)
LENGTHS = (1, 2, 4, 7, 31, 32, 33, 63, 64)
CASES = {"reference": 0, "cpu": 60, "cuda": 300}
good_arguments = slot


def random_arguments(seed):
    return random_case(seed, (1 + seed % 5, seed % 4, LENGTHS[seed % 9], 1 + seed % 7 * 13, seed % 3))


@compiled
def test_any_walk_is_applied_as_by_the_definition_and_the_cpu(backend, seed):
    case = random_arguments(seed)
    others = ("reference", "cpu") if backend == "cuda" else ("reference",)
    expected = {other: advance(copy_of(case), other) for other in others}
    case = advance(strided(case) if seed % 3 == 0 else case, backend)
    for other, wanted in expected.items():
        assert all(same_bits(case[name], wanted[name]) for name in WRITTEN), other


@given(
    number=st.integers(0, 2**32),
    sizes=st.tuples(*(st.integers(*ends) for ends in ((1, 5), (0, 3), (1, 9), (1, 4), (0, 3)))),
    apart=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_any_walk_is_applied_as_by_the_replay(backend, number, sizes, apart):
    case = random_case(number, sizes)
    expected = [replay(case, b) for b in range(sizes[0])]
    case = advance(strided(case) if apart else case, backend)
    for b, slot_expected in enumerate(expected):
        for name in WRITTEN:
            want = torch.tensor(slot_expected[name], dtype=DTYPES[name]).view(case[name][b].shape)
            assert same_bits(case[name][b], want), (b, name)


def column(case, name, b=0):
    return case[name][b].tolist()


def head(case, b=0):
    return column(case, "report", b)[:HEAD]


def test_step_inside_a_block_stays_there(backend):
    case = advance(slot(), backend)
    assert column(case, "text")[8:12] == [1, 9, 9, 9]
    assert (column(case, "start"), column(case, "revealed"), column(case, "step")) == (8, 1, 1)
    assert column(case, "step_map") == [1, 0, 0, 0] and column(case, "prob") == [0.5, 1.0, 1.0, 1.0]
    assert column(case, "draw_logprob") == [-0.5, 0.0, 0.0, 0.0]
    assert column(case, "last_rows") == [-1, 1, 2, 3]
    assert (column(case, "target_kv_len"), column(case, "draft_kv_len")) == (8, 8)
    assert column(case, "proposal_depth") == 2, "what was revealed is as proposed"
    assert head(case) == [42, 1, 0, 1, 1, 1, 1, 2, 0, 0, 1, 0, 3, 2, -7, -7]


def test_native_decoding_has_no_proposal_to_move(backend):
    case = advance(slot(blocks=0, **finished([1, 1, 1, 1], walk=2)), backend)
    assert column(case, "start") == 12 and column(case, "text")[8:12] == [1, 1, 1, 1]
    assert (column(case, "proposal_depth"), column(case, "draft_end")) == (0, NO_END)
    case = slot(blocks=0)
    case["proposal_depth"] += 2  # of an earlier shape, with room for more
    assert column(advance(case, backend), "proposal_depth") == 0


def test_proposal_that_stands_moves_to_the_front_and_loses_no_statistic(backend):
    walked = finished([1] * 4, tail={2: 1}, held=1, draft_end=2)
    case = advance(slot(**walked), backend)
    assert (column(case, "proposal_depth"), column(case, "draft_end")) == (1, 1)
    assert column(case, "draft_prob")[0] == [1.5] * 4 and column(case, "draft_log_odds")[0] == [2.5] * 4
    assert column(case, "draft_entropy")[0] == [3.5] * 4 and column(case, "order_sharpness")[0] == 0.25
    assert (column(case, "target_kv_len"), column(case, "draft_kv_len")) == (12, 12)
    assert column(case, "last_rows") == [-1] * 4, "the state was of the block before"


def test_last_rows_follow_the_walk_into_the_next_block(backend):
    case = advance(slot(**finished([1] * 4, tail={2: 1}, block=[0, 1, -1])), backend)
    assert column(case, "last_rows") == [10, 11, -1, 13] and head(case)[12] == 3


@pytest.mark.parametrize(
    "walked",
    [
        finished([1, 1, 4, 1]),
        finished([1] * 4, tail={0: 1, 3: 4}),
        finished([1] * 4, [1] * 4),
        finished([1] * 4, proposal_depth=1),
    ],
    ids=["finished otherwise", "revealed otherwise", "used up", "no deeper"],
)
def test_proposal_that_the_target_left_is_dropped(backend, walked):
    case = advance(slot(draft_end=2, **walked), backend)
    assert (column(case, "proposal_depth"), column(case, "draft_end"), head(case)[13]) == (0, NO_END, 0)


def test_draft_cache_falls_back_to_where_the_target_left_it(backend):
    case = advance(slot(**finished([1] * 4, [1, 1, 4, 1])), backend)
    assert column(case, "draft_kv_len") == 12
    behind = advance(slot(**finished([1] * 4, [1] * 4), draft_kv_len=3), backend)
    assert column(behind, "draft_kv_len") == 3, "what it lacks it still lacks"


def test_stop_id_ends_the_text_and_what_is_behind_it_does_not_count(backend):
    blocks = [1, 1, 1, 1], [1, 3, 1, 1], [1, 1, 1, 1]
    case = slot(**finished(*blocks, held=3))
    case["walk_prob"][0, 2, 0] = math.nan  # nobody sees the third block
    advance(case, backend)
    assert column(case, "start") == -1
    assert column(case, "text")[8:20] == [1, 1, 1, 1, 1, 3, 1, 1, 9, 9, 9, 9]
    assert column(case, "target_kv_len") == 16
    assert (column(case, "revealed"), column(case, "step"), column(case, "prob")) == (0, 0, [1.0] * 4)
    assert head(case)[:10] == [42, 1, 2, 5, 0, 3, 2, 2, 0, 1]


def test_stop_id_in_the_prompt_ends_nothing(backend):
    walked = finished([1, 3, 1, 1], prompt_len=10)
    assert column(advance(slot(**walked), backend), "start") == 12
    assert column(advance(slot(**{**walked, "prompt_len": 9}), backend), "start") == -1


def test_stop_id_in_the_block_on_its_way_waits_until_that_is_finished(backend):
    assert column(advance(slot(**finished([1] * 4, tail={0: 3})), backend), "start") == 12


@pytest.mark.parametrize("end, start", [(13, 12), (12, -1), (9, -1)])
def test_text_ends_where_it_is_full(backend, end, start):
    case = advance(slot(**finished([1] * 4), end=end), backend)
    assert column(case, "start") == start and head(case)[9] == int(start < 0)


def test_text_may_end_with_its_buffer(backend):
    case = advance(slot(capacity=3, **finished([1] * 4)), backend)
    assert column(case, "text") == [9] * 8 + [1] * 4 and column(case, "start") == -1


@pytest.mark.parametrize("prob", [math.nan, 0.0, -math.inf])
def test_failed_slot_stops_and_the_others_are_as_without_it(backend, prob):
    good, bad = slot(**finished([1] * 4, tail={1: 1})), slot(**finished([1] * 4, tail={1: 1}))
    bad["walk_prob"][0, 1, 1] = prob
    case = advance(batch_of([good, bad, good]), backend)
    alone = advance(good, backend)
    for b in (0, 2):
        assert all(same_bits(case[name][b], alone[name][0]) for name in WRITTEN)
    assert column(case, "start", 1) == -1 and head(case, 1)[8:10] == [1, 0]


def test_known_tokens_and_masked_positions_have_no_probability_to_fail_by(backend):
    case = slot()
    case["walk_step_map"][0, 0, 0] = 0  # known from the prompt
    case["walk_prob"][0, 0] = 0.0
    assert head(advance(case, backend))[8] == 0


@pytest.mark.parametrize("idle", [{"start": -1}, {"start": -4}, {"walk_progress": [0, 0, 0, -1, 0, 0, 0]}])
def test_slot_that_sits_out_keeps_everything(backend, idle):
    case = slot(**{"target_kv_len": 3, **idle})
    before = copy_of(case)
    advance(case, backend)
    assert all(same_bits(case[name], before[name]) for name in WRITTEN if name != "report")
    assert column(case, "report") == [42, *[0] * 13, -7, -7, *[0] * 80]


@pytest.mark.parametrize("number", range(10))
def test_slot_is_the_same_alone_and_in_company(backend, number):
    case = random_case(number, (6, 2, 4, 3, 2))
    alone = [{name: value[b : b + 1].clone() for name, value in case.items()} for b in range(6)]
    advance(case, backend)
    for b, one in enumerate(alone):
        advance(one, backend)
        assert all(same_bits(one[name][0], case[name][b]) for name in WRITTEN)


def test_many_slots_are_advanced_as_few_are(backend):
    case = random_case(1, (300, 3, 32, 4, 3))
    expected = copy_of(case)
    for first in range(0, 300, 50):
        advance({name: value[first : first + 50] for name, value in expected.items()}, "reference")
    advance(case, backend)
    assert all(same_bits(case[name], expected[name]) for name in WRITTEN)


def test_block_of_64_uses_every_bit(backend):
    case = advance(slot(length=64, **finished([1] * 64, length=64, tail={0: 1, 63: 1})), backend)
    assert column(case, "revealed") == 1 - 2**63
    assert head(case)[10:12] == [1, -(2**31)]
    assert column(case, "text")[192:256] == [1, *[9] * 62, 1]


def test_slots_as_columns_of_one_packed_buffer(backend):
    case = random_case(3, (4, 2, 4, 3, 2))
    packed, expected = {}, copy_of(case)
    buffers = {dtype: torch.full((4, 4096), 99, dtype=dtype) for dtype in (torch.int32, torch.int64, torch.float32)}
    at = dict.fromkeys(buffers, 3)
    for name, given_value in case.items():
        rows = given_value.flatten(1) if given_value.dim() > 1 else given_value[:, None]
        first = at[given_value.dtype]
        at[given_value.dtype] = first + rows.shape[1] + 1
        view = buffers[given_value.dtype][:, first : first + rows.shape[1]]
        view.copy_(rows)
        packed[name] = view.unflatten(1, given_value.shape[1:]) if given_value.dim() > 1 else view[:, 0]
    advance(packed, backend)
    advance(expected, "reference")
    assert all(same_bits(packed[name], expected[name]) for name in WRITTEN)
    for dtype, buffer in buffers.items():
        assert bool((buffer[:, :3] == 99).all()) and bool((buffer[:, at[dtype] :] == 99).all())


@pytest.mark.parametrize("sizes", [(0, 2, 4, 3, 2), (3, 2, 0, 3, 2), (3, 0, 4, 0, 0), (0, 0, 0, 0, 0)])
def test_empty_batches_blocks_states_and_stop_ids_are_fine(backend, sizes):
    batch, blocks, length, states, stops = sizes
    case = random_case(0, (batch, blocks, length, max(states, 1), stops))
    case["walk_progress"][:, 3] = -1
    case["state_rows"], case["block"] = case["state_rows"][:, :states], case["block"][:, :states]
    before = copy_of(case)
    advance(case, backend)
    assert all(same_bits(case[name], before[name]) for name in WRITTEN if name != "report")


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


REFUSED = [
    ("text", torch.zeros(1, 32), TypeError, "text must be torch.int64, got torch.float32"),
    ("text", torch.zeros(2, 32, dtype=torch.int64), ValueError, r"start must be \[B\] = \[2\]"),
    ("start", torch.zeros(1, dtype=torch.int64), TypeError, "start must be torch.int32"),
    ("start", int32(29), ValueError, "start must be at most 28, got 29"),
    ("revealed", int32(0), TypeError, "revealed must be torch.int64"),
    ("step", 3, TypeError, "step must be a tensor, got int"),
    ("step_map", torch.zeros(1, 65, dtype=torch.int32), ValueError, "prob must be"),
    ("prob", torch.zeros(1, 4, dtype=torch.float64), TypeError, "prob must be torch.float32"),
    ("draw_logprob", torch.zeros(1, 3), ValueError, r"draw_logprob must be \[B, L\] = \[1, 4\]"),
    ("origin", torch.zeros(1, 3, dtype=torch.int32), ValueError, r"origin must be \[B, L\] = \[1, 4\]"),
    ("last_rows", torch.zeros(1, 4, dtype=torch.int64), TypeError, "last_rows must be torch.int32"),
    ("draft_tokens", torch.zeros(1, 1, 4, dtype=torch.int64), ValueError, r"draft_prob must be .* = \[1, 1, 4\]"),
    ("draft_entropy", torch.zeros(1, 2, 4).double(), TypeError, "draft_entropy must be torch.float32"),
    ("order_sharpness", torch.zeros(1, 3), ValueError, r"order_sharpness must be \[B, K\] = \[1, 2\]"),
    ("proposal_depth", int32(-1), ValueError, "proposal_depth must be >= 0, got -1"),
    ("report", torch.zeros(1, 64, dtype=torch.int32), ValueError, r"report must be .* = \[1, 96\], got \[1, 64\]"),
    ("report", torch.zeros(1, 96), TypeError, "report must be torch.int32"),
    ("stop_ids", torch.zeros(1, dtype=torch.int64), ValueError, r"stop_ids must be \[B, E\]"),
    ("walk_progress", torch.zeros(1, 6, dtype=torch.int32), ValueError, r"walk_progress must be .* = \[1, 7\]"),
    ("walk_progress", int32([4, 0, 1, 0, 1, 1, 1]), ValueError, r"walk_progress\[:, 0\] must be in .*\[0, 3\], got 4"),
    ("walk_progress", int32([-1, 0, 1, 0, 1, 1, 1]), ValueError, r"walk_progress\[:, 0\] must be in .*, got -1"),
    ("walk_progress", int32([0, 0, 1, 3, 1, 1, 1]), ValueError, r"walk_progress\[:, 3\] must be in .*\[-1, 2\], got 3"),
    ("walk_tokens", torch.zeros(1, 2, 4, dtype=torch.int64), ValueError, r"walk_tokens must be .* = \[1, 4, 4\]"),
    ("walk_draw_logprob", torch.zeros(1, 4, 3), ValueError, "walk_draw_logprob must be"),
    ("walk_prob", torch.zeros(1, 4, 4, dtype=torch.bfloat16), TypeError, "walk_prob must be torch.float32"),
    ("state_rows", torch.zeros(1, 3, 5, dtype=torch.int32), ValueError, r"state_rows must be \[B, C, L\]"),
    ("block", torch.zeros(1, 2, dtype=torch.int32), ValueError, r"block must be \[B, C\] = \[1, 3\]"),
    ("draft_blocks_in_rows", torch.zeros(1), TypeError, "draft_blocks_in_rows must be torch.int32"),
    ("end", torch.zeros(1, dtype=torch.int32, device="meta"), ValueError, "one device.*end on meta"),
]


def past_the_text(tail):
    """A walk whose last block ends behind the text, which has room for the finished one."""
    return slot(capacity=3, **finished([1] * 4, tail=tail))


def test_walk_past_the_text_is_refused():
    advance_slots(**past_the_text({}))
    with pytest.raises(ValueError, match="walk's last position must be within the text of 12 tokens, got 16"):
        advance_slots(**past_the_text({0: 1}))


@needs_compiled_ops
@pytest.mark.parametrize(
    "case",
    [
        *({**slot(), "walk_progress": int32(row)} for row in ([4, 0, 1, 0, 1, 1, 1], [-1, 0, 1, 0, 1, 1, 1])),
        *({**slot(), "walk_progress": int32([0, 0, 1, last, 1, 1, 1])} for last in (3, 2**31 - 1)),
        *({**slot(), "start": int32(start)} for start in (29, 2**31 - 1)),
        past_the_text({0: 1}),
    ],
)
def test_compiled_op_writes_nowhere_but_in_the_slots(case):
    before = copy_of(case)
    with pytest.raises(RuntimeError, match="advance_slots: "):
        torch.ops.simsd.advance_slots(**case)
    assert all(same_bits(case[name], before[name]) for name in ORDER)


@needs_compiled_ops
@pytest.mark.parametrize(
    "name", ["walk_revealed", "proposal_depth", "draft_end", "prompt_len", "end", "stop_ids", "block"]
)
@pytest.mark.parametrize("number", [-(2**30), -1, 1, 2**30, 2**31 - 1])
def test_compiled_op_survives_any_number_and_the_definition_agrees(name, number):
    case = random_case(8, (4, 2, 4, 3, 2))
    case[name] = torch.full_like(case[name], number)
    expected = copy_of(case)
    torch.ops.simsd.advance_slots(**case)
    reference.advance_slots(**expected)
    assert all(same_bits(case[other], expected[other]) for other in WRITTEN)


def test_opcheck():
    torch.library.opcheck(torch.ops.simsd.advance_slots, tuple(slot(**finished([1] * 4, tail={2: 1})).values()))


def test_long_walk_of_a_long_proposal_moves_what_stands(backend):
    blocks = [[1] * 64] * 5
    case = slot(length=64, blocks=7, capacity=12, **finished(*blocks, length=64, walk=9, tail={63: 1}, draft_end=7))
    advance(case, backend)
    assert case["proposal_depth"].item() == 2 and case["draft_end"].item() == 2 < NO_END
    assert case["draft_prob"][0, :, 0].tolist() == [5.5, 6.5, 2.5, 3.5, 4.5, 5.5, 6.5]


@backends("emulation")
def test_one_launch_with_a_warp_per_slot(counted):
    counters = counted(lambda: advance(random_case(5, (7, 2, 4, 3, 2)), "cuda"))
    assert counters["launches"] == 1 and counters["blocks"] == 7


@backends("emulation")
def test_walk_past_the_text_ends_the_launch():
    with pytest.raises(RuntimeError, match="the walk must stay within the text"):
        dispatch.operator("advance_slots", "cuda")(**past_the_text({0: 1}))
