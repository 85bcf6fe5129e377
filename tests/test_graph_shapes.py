"""benchmarks/cpu/graph_shapes.py, planners.py, traces.py: what is counted, and which states are chosen."""

from __future__ import annotations

import json
import math

import pytest

import simsd
from benchmarks import contest, registry, report
from benchmarks.cpu import graph_shapes as shapes
from benchmarks.cpu.planners import CalibratedGraph, order_tree, self_chain
from benchmarks.cpu.traces import MASKED, Block, Count, Drawn, Seen, cost, masked, put, replay
from simsd import tasks
from simsd.benchmarking import Item
from stand_ins import random_sdar

pytestmark = pytest.mark.usefixtures("one_thread")
FRESH = (MASKED,) * 4


def seen(log_odds, token=(10, 11, 12, 13), others=(20, 21, 22, 23)) -> Seen:
    """What a greedy forward told: tokens, the second likeliest, and log-odds, from which probabilities follow."""
    drawn = Drawn(list(token), [1 / (1 + math.exp(-x)) for x in log_odds], list(log_odds))
    return Seen(drawn, [list(pair) for pair in zip(token, others, strict=True)], lambda _: drawn)


def block(order, log_odds, *, last=False, token=(10, 11, 12, 13)) -> Block:
    """A block that native decoding reveals in that order, every state of which shows the same log-odds."""
    path = [FRESH]
    for at in order:
        path.append(put(path[-1], at, token[at]))
    return Block(path, [seen(log_odds)] * 4, prompt=0, stop_ids=frozenset({99}), last=last)


def sets(states):
    return [{i for i in range(4) if i not in masked(state)} for state in states]


# Which states are chosen


def test_the_self_chain_reveals_in_order_of_confidence_and_goes_on_to_the_next_block():
    one = block([0, 1, 2, 3], [1.0, 4.0, 2.0, 3.0])
    root = put(FRESH, 1, 11)
    assert sets(self_chain(one, one.seen[0], root, 8)) == [{1, 3}, {1, 2, 3}, {0, 1, 2, 3}]
    assert self_chain(one, one.seen[0], root, 1) == [(MASKED, 11, MASKED, 13)]


def test_equally_confident_positions_are_taken_from_the_left_as_native_takes_them():
    one = block([0, 1, 2, 3], [2.0] * 4)
    assert sets(self_chain(one, one.seen[0], FRESH, 2)) == [{0}, {0, 1}]


def test_the_order_tree_branches_where_the_order_is_open_and_not_where_it_is_certain():
    certain, is_open = block([0, 1, 2, 3], [30.0, 20.0, 10.0, 5.0]), block([0, 1, 2, 3], [9.0, 9.0, 1.0, 0.9])
    assert sets(order_tree(certain, certain.seen[0], FRESH, 3)) == [{0}, {0, 1}, {0, 1, 2}]
    assert sets(order_tree(is_open, is_open.seen[0], FRESH, 3)) == [{0}, {1}, {0, 1}]


def test_no_state_is_taken_twice_and_a_doubtful_token_comes_later():
    one = block([0, 1, 2, 3], [3.0, 3.0, -2.0, -2.0])
    states = order_tree(one, one.seen[0], FRESH, 16)
    assert len(states) == len(set(states)) == 15  # every set but the empty one; the finished block costs two
    assert sets(states)[:3] == [{0}, {1}, {0, 1}]


@pytest.mark.parametrize("odd", [math.inf, -math.inf, 1e30])
def test_infinite_log_odds_make_no_order_tree_of_nan(odd):
    one = block([0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0])
    told = Seen(Drawn([10, 11, 12, 13], [0.5] * 4, [odd, 1.0, 2.0, odd]), [], lambda _: told.drawn)
    states = order_tree(one, told, FRESH, 16)
    assert states and all(cost(state) in (1, 2) for state in states)


def test_a_calibrated_graph_has_the_order_that_calibration_met_whatever_the_confidence():
    """Native reveals the least confident of what is left each time: rank 2, then 1, then 0."""
    known = [[block([0, 3, 2, 1], [4.0, 3.0, 2.0, 1.0])]] * 3 + [[block([0, 1, 2, 3], [4.0, 3.0, 2.0, 1.0])]]
    graph = CalibratedGraph(known)
    new = block([2, 0, 1, 3], [7.0, 1.0, 8.0, 5.0])  # behind position 2: ranks 0, 3, 1
    assert sets(graph(new, new.seen[0], new.path[1], 5)) == [{1, 2}, {1, 2, 3}, {0, 1, 2, 3}, {0, 2}]


def test_a_calibrated_graph_names_tokens_by_rank_too():
    """A second likeliest token that native came to take is drafted; one that is not among the likeliest is not."""
    one = block([0, 1, 2, 3], [4.0, 3.0, 2.0, 1.0], token=(10, 21, 12, 13))
    new = block([0, 1, 2, 3], [4.0, 3.0, 2.0, 1.0])
    assert CalibratedGraph([[one]])(new, new.seen[0], new.path[1], 1) == [(10, 21, MASKED, MASKED)]
    one = block([0, 1, 2, 3], [4.0, 3.0, 2.0, 1.0], token=(10, 77, 12, 13))
    assert CalibratedGraph([[one]])(new, new.seen[0], new.path[1], 8) == []


def test_a_graph_without_calibration_chooses_nothing():
    one = block([0, 1, 2, 3], [4.0, 3.0, 2.0, 1.0])
    assert CalibratedGraph([])(one, one.seen[0], one.path[1], 8) == []


@pytest.mark.parametrize("room", range(12))
@pytest.mark.parametrize("plan", [self_chain, order_tree, "calibrated"])
def test_no_planner_takes_more_rows_than_there_are(plan, room):
    one = block([0, 3, 2, 1], [2.0, 1.5, 1.4, 1.3])
    if plan == "calibrated":
        plan = CalibratedGraph([[one, one], [block([1, 0, 2, 3], [2.0, 1.5, 1.4, 1.3])]])
    states = plan(one, one.seen[0], one.path[1], room)
    assert sum(map(cost, states)) <= room
    assert sum(not masked(state) for state in states) <= 1


@pytest.mark.parametrize("plan", [self_chain, order_tree])
@pytest.mark.parametrize("change", [{"last": True}, {"token": (10, 11, 12, 99)}], ids=["last block", "end token"])
def test_nothing_is_drafted_behind_the_end_of_the_text(plan, change):
    one = block([0, 1, 2, 3], [4.0, 3.0, 2.0, 1.0], **change)
    told = seen([4.0, 3.0, 2.0, 1.0], change.get("token", (10, 11, 12, 13)))
    assert all(masked(state) for state in plan(one, told, one.path[1], 16))


# How many forwards that takes


def test_a_perfect_chain_takes_a_forward_for_each_block_but_the_first():
    """The first forward leaves what the others are drafted from; each finishes a block and begins the next one."""
    text = [block([0, 1, 2, 3], [4.0, 3.0, 2.0, 1.0], last=n == 2) for n in range(3)]
    # 1 current state; then twice 1 + {0, 1}, {0, 1, 2} and the finished block with the fresh one; then 1 + 2.
    assert replay(text, self_chain, 4) == Count(forwards=4, blocks=1 + 5 + 5 + 3)


def test_where_the_finished_block_has_no_rows_the_next_one_takes_a_forward_more():
    text = [block([0, 1, 2, 3], [4.0, 3.0, 2.0, 1.0], last=n == 1) for n in range(2)]
    assert replay(text, self_chain, 3) == Count(forwards=4, blocks=(1 + 3) * 1 + (1 + 2) * 2 - 2)


def test_a_chain_in_the_wrong_order_takes_a_forward_for_each_step():
    text = [block([3, 2, 1, 0], [4.0, 3.0, 2.0, 1.0], last=True)]
    assert replay(text, self_chain, 8).forwards == 4  # the last step has no choice, and no forward before it saw it


def test_without_rows_it_is_native_decoding():
    text = [block([0, 1, 2, 3], [4.0, 3.0, 2.0, 1.0], last=n == 1) for n in range(2)]
    assert replay(text, order_tree, 0) == Count(forwards=8, blocks=8)


def test_a_plan_that_takes_more_than_its_rows_is_refused():
    text = [block([0, 1, 2, 3], [4.0, 3.0, 2.0, 1.0])] * 2
    with pytest.raises(ValueError, match="a plan of 1 states takes 2 blocks of rows, there is room for 1"):
        replay(text, lambda *_: [(10, 11, 12, 13)], 1)


# What native decoding shows


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("length", [4, 8, 16])
def test_the_replayed_self_chain_takes_the_forwards_that_the_engine_takes(length, temperature, monkeypatch):
    """The built-in target's own chain, run in the engine and replayed along native's path: the same forwards. From the
    last state visited, as the published chain is, and from no other that was seen."""
    for name in ("keep", "seen_states"):
        monkeypatch.setattr(f"simsd.decode.seen.{name}", lambda *_: None)
    target = simsd.load("tiny-target")
    prompts = [target.encode_prompt(task.prompt) for family in tasks.FAMILIES for task in tasks.held_out(family, 2)]
    settings = {"max_new_tokens": 48, "block_length": length, "temperature": temperature, "seed": 0}
    native, _, texts = shapes.decode_natively(target, prompts, simsd.GenerationConfig(**settings, verify="none"))
    assert [sum(len(one.seen) for one in text) for text in texts] == [r.stats.target_forwards for r in native]
    for rows in (32, 128):
        config = simsd.GenerationConfig(**settings, max_rows=rows, drafter="self", order_sharpness=shapes.CHAIN)
        done, _ = shapes.decode(target, None, prompts, config, shapes.RowCounter())
        replayed = [replay(text, self_chain, rows // length).forwards for text in texts]
        assert replayed == [result.stats.target_forwards for result in done]


def test_traces_are_the_text_that_native_decoding_returns():
    target = random_sdar(0)
    config = simsd.GenerationConfig(max_new_tokens=11, block_length=4, verify="none", end_token_ids=())
    prompt = list(range(1, 10))
    results, _, (text,) = shapes.decode_natively(target, [prompt], config)
    assert (*prompt[8:], *results[0].tokens) == sum((one.path[-1] for one in text), ())
    assert [one.prompt for one in text] == [1, 0, 0] and [one.last for one in text] == [False, False, True]
    for one in text:
        for before, after, told in zip(one.path, one.path[1:], one.seen, strict=False):
            (at,) = (i for i in range(4) if before[i] != after[i])
            assert after[at] == told.drawn.token[at] == told.likeliest[at][0] != told.likeliest[at][1]


def test_native_decoding_of_several_tokens_a_step_is_refused():
    target = random_sdar(0)
    config = simsd.GenerationConfig(max_new_tokens=8, block_length=4, verify="none", steps=2, end_token_ids=())
    with pytest.raises(Exception, match="only one token per step"):
        shapes.decode_natively(target, [[1, 2, 3]], config)


def test_rows_of_native_forwards_are_the_block_and_what_it_commits():
    """9 prompt tokens and 4 + 4 + 4 of the answer: blocks of 3, 4 and 4 steps; two commits ride along."""
    target = random_sdar(0)
    counter = shapes.RowCounter()
    config = simsd.GenerationConfig(max_new_tokens=11, block_length=4, verify="none", end_token_ids=())
    results, rows = shapes.decode(target, None, [list(range(1, 10))], config, counter)
    assert results[0].stats.target_forwards == counter.forwards == 11
    assert rows == (11 * 4 + 2 * 4) / 11


# The table


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_records_hold_every_contestant_at_the_same_rows(temperature):
    target, draft = random_sdar(0), random_sdar(0)  # a perfect draft
    items, known = [Item("x", [1, 2, 3]), Item("y", [4, 5])], [Item("x", [7, 8, 9]), Item("y", [6, 5])]
    settings = simsd.GenerationConfig(max_new_tokens=16, block_length=4, temperature=temperature)
    records = shapes.measure(target, draft, items, known, settings, [16, 64])
    assert [record["max_rows"] for record in records] == [16, 64]
    for record in records:
        assert tuple(record["shapes"]) == (*shapes.BASELINES, *shapes.OURS)
        for name, figures in record["shapes"].items():
            assert 0 < figures["forwards_ratio"] <= 1.0 and set(figures["by_family"]) == {"x", "y"}
            assert figures["draft_ratio"] == 0 or name in ("model chain", "model", "auto")
            # Two blocks may wait for their commit beside the current state and the drafted ones.
            assert figures["rows"] <= record["max_rows"] + 3 * record["block_length"]
        assert all(record["shapes"][name]["same_text"] == 1.0 for name in shapes.ENGINE)
        assert record["shapes"]["model"]["draft_ratio"] > 0
    made = contest.Bench()
    shapes.report(made, records)
    lines = [line for line in report.tables_of(made.state()) if line]
    assert len(lines) == 2 + len(records) and len({line.count("|") for line in lines}) == 1
    assert all(cell.strip() for cell in lines[-1].strip("|").split("|"))
    assert not made.notes
    json.dumps(made.state(), allow_nan=False)


def test_a_text_that_is_not_natives_is_told():
    figures = {"forwards_ratio": 0.5, "draft_ratio": 0.0, "same_text": 0.5}
    record = {"block_length": 4, "temperature": 0.0, "max_rows": 16, "over_best": 1.0}
    made = contest.Bench()
    shapes.report(made, [record | {"shapes": dict.fromkeys((*shapes.BASELINES, *shapes.OURS), figures)}])
    assert made.notes == ["ONLY 50.0% of the engine's texts are native's at block 4, T 0"]


def test_prompts_of_calibration_are_not_those_that_are_measured():
    asked, known = shapes.items_of(tasks, ["facts", "code"], 3, 4)
    assert [item.family for item in known] == ["facts", "code", "facts", "code"] and len(asked) == 6
    assert {item.prompt for item in asked}.isdisjoint(item.prompt for item in known)


def test_an_unknown_pair_is_refused():
    settings = registry.BENCHMARKS["graph_shapes"].settings | {"pair": "huge"}
    settings.pop("threads")
    with pytest.raises(ValueError, match="pair must be among tiny, long; got 'huge'"):
        shapes.run(contest.Bench(), **settings)


# The picture


def test_the_picture_of_a_result_is_drawn_from_its_rows_alone(tmp_path):
    pytest.importorskip("matplotlib")
    names = (*shapes.BASELINES, *shapes.OURS)
    rows = [
        {
            "block_length": length,
            "temperature": temperature,
            "max_rows": rows,
            "shapes": {name: {"forwards_ratio": 0.4} for name in names},
        }
        for length in (4, 8)
        for temperature in (0.0, 0.8)
        for rows in (32, 128)
    ]
    drawn = []
    for name in ("a.svg", "b.svg"):
        registry.BENCHMARKS["graph_shapes"].draw(rows, tmp_path / name)
        drawn.append((tmp_path / name).read_text())
    assert drawn[0] == drawn[1] and "<svg" in drawn[0]


def test_a_page_of_results_shows_its_picture():
    result = {"about": "About.", "status": "done", "rows": [], "picture": "graph_shapes.svg"}
    assert "![graph_shapes](graph_shapes.svg)" in report.alone("graph_shapes", result, {}, [])
