"""Which requests share an iteration, and how large it is."""

from __future__ import annotations

import pytest

from simsd import EngineConfig, SamplingParams
from simsd.decode.exchange import MODEL_DRAFT, SELF_DRAFT
from simsd.decode.temporal import Temporal
from simsd.engine.request import MAX_FAILURES, Request
from simsd.engine.scheduler import Occupant
from simsd.engine.shapes import Chunk, Group, group_of, prefill_chunk, row_budget, shape_of, states_needed, turns_of
from simsd.engine.tuner import LOOKUP, NONE, OWN, DraftMode

MODEL, FURTHER, OWN_FURTHER = DraftMode(MODEL_DRAFT, 1), DraftMode(MODEL_DRAFT, 3), DraftMode(SELF_DRAFT, 2)
LENGTH = 4
EXACT = Group(1)


def group(others=(), allowed=(), has_draft=True, **params) -> Group:
    return group_of(SamplingParams(**params), allowed, LENGTH, others, has_draft)


def occupant(pending: int = 0, lag: int = 0, standing: int = 0, **params) -> Occupant:
    made = Request(0, [1], SamplingParams(**params), 0, (), None)
    return Occupant(made, 1, [], [], pending, (0, 0), pending, lag, standing=standing)


def shape(occupants, modes, group=EXACT, static=False, self_drafts=True, slots=4, **config):
    config = EngineConfig(**{"lookahead": 3} | config)
    return shape_of(group, occupants, modes, config, LENGTH, slots, static, self_drafts)


def test_exact_requests_share_an_iteration_whatever_they_reveal_and_draw():
    assert group() == group(strategy="sequential", temperature=1.0, top_k=3, drafter="self", steps=2) == Group(1)


def test_drafts_of_several_forwards_go_apart():
    assert group(draft_steps=3) == Group(3) != group()


def test_what_decodes_natively_joins_whoever_is_exact():
    temporal = group(verify="temporal")
    assert group([temporal, Group(3), Group(1)], verify="none") == Group(3)
    assert group([temporal], verify="none") == Group(1)
    assert group([Group(3, (5,)), Group(2)], verify="none") == Group(2)
    assert group([Group(3, (5,)), Group(2)], allowed=(5,), verify="none") == Group(3, (5,))
    assert group([Group(3)], allowed=(5,), verify="none") == Group(1, (5,))


def test_where_no_draft_model_drafts_its_forwards_part_nobody():
    assert group(drafter="self", draft_steps=3) == group(has_draft=False, draft_steps=3) == Group(1)
    assert group([Group(2)], drafter="self", draft_steps=3) == Group(2)
    assert group(drafter="lookup", draft_steps=3) == Group(1)


def test_end_tokens_that_are_banned_for_others_are_generated_only_where_they_were_asked_for():
    assert group(allowed=(5,)) != group() and group(allowed=(5,)).allowed_ids == (5,)


@pytest.mark.parametrize(
    ("params", "forwards"),
    [({}, 4), ({"steps": 2}, 2), ({"draft_steps": 3}, 3), ({"steps": 2, "draft_steps": 4}, 2), ({"draft_steps": 1}, 1)],
    ids=str,
)
def test_a_temporal_draft_takes_no_more_forwards_than_there_are_steps(params, forwards):
    assert group(verify="temporal", **params).draft_steps == forwards


def test_temporal_requests_share_an_iteration_where_they_are_judged_alike():
    one = group(verify="temporal", accept="mrs", rejected_tail="draft_argmax")
    assert one.temporal == Temporal("mrs", "draft_argmax", gates=False)
    assert one == group(verify="temporal", accept="mrs", rejected_tail="draft_argmax", temperature=1.0)
    assert group(verify="temporal", end_gate=0.5) == group(verify="temporal", end_gate=0.1) != group(verify="temporal")


def test_a_request_of_which_iterations_raised_runs_behind_the_others_and_alone():
    occupants = [occupant(), occupant(verify="temporal"), occupant(), occupant(draft_steps=2), occupant()]
    for _ in range(MAX_FAILURES - 1):
        occupants[0].request.stumble("an error")
    turns = turns_of(enumerate(occupants), LENGTH, has_draft=True)
    assert [members for _, members in turns] == [[1], [2, 4], [3], [0]]
    assert [one for one, _ in turns] == [group(verify="temporal"), Group(1), Group(2), Group(1)]


@pytest.mark.parametrize(
    ("max_rows", "length", "states"), [(None, 4, 33), (None, 64, 3), (0, 4, 1), (3, 4, 1), (4, 4, 2), (10**6, 4, 256)]
)
def test_states_are_as_many_as_the_rows_allow_and_clocks_tell_apart(max_rows, length, states):
    assert states_needed(EngineConfig(max_rows=max_rows), length) == states


def test_rows_are_for_each_sequence_unless_they_are_given_for_all():
    assert row_budget(EngineConfig(), 3) == 3 * row_budget(EngineConfig(), 1) == 384
    assert row_budget(EngineConfig(max_rows=50), 3) == row_budget(EngineConfig(max_rows=50), 1) == 50


def test_without_drafts_only_current_blocks_are_looked_at():
    got = shape([occupant(standing=2), occupant()], [NONE, NONE])
    assert (got.lookahead, got.states, got.logits_rows, got.draft_blocks) == (0, 1, 4 * LENGTH, 0)
    assert not got.self_draft and got.keeps_logits
    assert not shape([occupant()], [NONE], self_drafts=False).keeps_logits


@pytest.mark.parametrize(
    ("modes", "standing", "lookahead", "draft_blocks", "own"),
    [
        ([MODEL, NONE], (0, 0), 1, 1, False),
        ([MODEL, FURTHER], (0, 0), 3, 3, False),
        ([OWN, NONE], (0, 0), 1, 0, True),
        ([OWN, MODEL], (0, 2), 2, 1, True),
        ([OWN_FURTHER, NONE], (0, 0), 2, 2, True),
        ([MODEL, NONE], (3, 0), 3, 1, False),
    ],
    ids=str,
)
def test_an_iteration_is_as_deep_as_its_deepest_draft(modes, standing, lookahead, draft_blocks, own):
    got = shape([occupant(standing=n) for n in standing], modes)
    assert (got.lookahead, got.draft_blocks, got.self_draft) == (lookahead, draft_blocks, own)
    assert (got.states, got.logits_rows) == (33, 4 * 33 * LENGTH)


@pytest.mark.parametrize("static", [False, True])
def test_a_lookup_goes_as_far_ahead_as_may_be_and_behind_the_targets_own_logits_where_there_are_some(static):
    fresh, begun = occupant(), occupant()
    begun.masked = 2
    got = [shape([one, occupant()], [LOOKUP, NONE], static=static) for one in (fresh, begun)]
    assert [(one.lookup, one.lookahead, one.draft_blocks, one.self_draft) for one in got] == [
        (True, 3, 0, False),
        (True, 3, 0, True),
    ]
    assert not shape([begun], [OWN]).lookup


def test_noise_and_filters_are_there_where_anyone_asks_for_them():
    plain, cold = occupant(), occupant(top_k=3)
    assert (shape([plain], [NONE]).noise, shape([plain], [NONE]).filters) == (False, (False, False))
    got = shape([plain, occupant(temperature=0.5, top_p=0.9)], [NONE, NONE])
    assert (got.noise, got.filters) == (True, (False, True))
    assert shape([plain, cold], [NONE, NONE]).filters == (True, False)


def test_blocks_that_wait_ride_along_where_shapes_need_not_be_few():
    late = [occupant(pending=12, lag=20), occupant(pending=4, lag=4)]
    got = shape(late, [MODEL, MODEL])
    assert (got.pending, got.draft_pending) == (3, 5)
    got = shape([occupant()], [MODEL])
    assert (got.pending, got.draft_pending) == (1, 2)
    got = shape(late, [MODEL, MODEL], static=True)
    assert (got.pending, got.draft_pending) == (1, 2)


def test_static_shapes_do_not_follow_how_deep_drafts_stand():
    made = [shape([occupant(standing=n)], [mode], static=True) for n in (0, 1, 3) for mode in (MODEL, FURTHER)]
    assert len(set(made)) == 1 and (made[0].lookahead, made[0].draft_blocks) == (3, 3)
    own = shape([occupant()], [OWN], static=True)
    assert (own.lookahead, own.draft_blocks, own.self_draft) == (1, 0, True)


@pytest.mark.parametrize(
    ("active", "max_rows", "states"),
    [
        (1, None, 8),  # 1 + 128 / 16 = 9
        (2, None, 16),  # 1 + 256 / 16 = 17
        (4, None, 32),  # 1 + 512 / 16 = 33
        (4, 0, 1),
        (4, 40, 2),  # 1 + 40 / 16 = 3
        (1, 200, 8),  # 1 + 200 / 16 = 13
    ],
)
def test_static_states_are_powers_of_two_of_a_slot_s_share(active, max_rows, states):
    got = shape([occupant()] * active, [MODEL] * active, static=True, max_rows=max_rows)
    assert (got.states, got.logits_rows) == (states, 4 * states * LENGTH)


def test_a_temporal_iteration_has_one_drafted_block():
    judged = Group(2, (5,), Temporal("match", "truncate"))
    got = shape([occupant(verify="temporal", temperature=0.5)], [NONE], judged)
    assert (got.lookahead, got.states, got.draft_steps, got.allowed_ids) == (1, 1, 2, (5,))
    assert got.temporal == judged.temporal and got.noise and not got.keeps_logits


def test_what_comes_along_anyway_needs_no_chunk():
    assert prefill_chunk([(0, 4), (1, 0), (2, 4)], 4, 64, 0, 4) == Chunk([], 0, set())


def test_short_prompts_come_along_as_long_as_there_is_room():
    """Room for 64 tokens: the first two; the third has what is left, and takes part later."""
    chunk = prefill_chunk([(5, 40), (0, 20), (2, 40)], 4, 64, 64, 4)
    assert chunk == Chunk([2], 4, {2})
    assert prefill_chunk([(5, 40), (0, 24), (2, 40)], 4, 64, 64, 4) == Chunk([], 0, {2})


def test_a_long_prompt_goes_ahead_in_chunks_and_takes_part_after_the_last():
    lacks, chunks = 150, 0
    while (chunk := prefill_chunk([(3, lacks), (1, 4)], 4, 64, 0, 4)).behind:
        assert chunk == Chunk([3], 64, {3})
        lacks, chunks = lacks - chunk.tokens, chunks + 1
    assert chunks == 2 and chunk == Chunk([3], 20, set())


def test_where_nothing_comes_along_prompts_share_a_chunk_without_many_dead_rows():
    """Rows are as many for each: 3 * 20 fit into 64, 4 * 20 do not."""
    chunk = prefill_chunk([(0, 20), (1, 12), (2, 20), (3, 8)], 4, 64, 0, 4)
    assert chunk == Chunk([0, 1, 2], 20, {3})
    assert prefill_chunk([(0, 12), (1, 40), (2, 20)], 4, 64, 0, 4) == Chunk([0, 2], 20, {1})


def test_of_a_prompt_in_a_chunk_a_block_may_be_left():
    assert prefill_chunk([(0, 68)], 4, 64, 0, 4) == Chunk([0], 64, set())
    assert prefill_chunk([(0, 72)], 4, 64, 0, 4) == Chunk([0], 64, {0})
