"""Which states are taken, by hand: the lattice under each rule, budgets, and where nothing follows."""

import math

import pytest
import torch

from plans import NEVER, VOCABULARY, arguments, graph, ints, plan, sizes
from rules import STRATEGIES, even, rule

OP = "plan_block"


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_no_floor_and_ample_budgets_take_the_whole_lattice(backend, strategy, length):
    rules = [(even(length, length), strategy, 1.0 if "low" in strategy else 0.1)]
    made = arguments(ahead=2, length=length, rules=rules, blocks_left=ints(2))
    found = graph(plan(made, backend))
    drafted = made["draft_tokens"][0].tolist()
    assert len(found) == 2 * (2**length - 1)
    for block, bits, tokens in found:
        assert tokens == tuple(t if bits >> i & 1 else None for i, t in enumerate(drafted[block]))


def test_sequential_takes_prefixes_only(backend):
    made = arguments(ahead=2, length=6, rules=[(even(6, 6), "sequential", 0.0)])
    assert [(block, bits) for block, bits, _ in graph(plan(made, backend))] == [
        *((0, (1 << n) - 1) for n in range(6)),
        *((1, (1 << n) - 1) for n in range(6)),
        (2, 0),
    ]


def test_two_reveals_per_step_take_even_counts_only(backend):
    rules = [(even(6, 3), "low_confidence_static", 0.0)]
    found = sizes(plan(arguments(length=6, rules=rules, blocks_left=ints(1)), backend))
    assert set(found) == {0, 2, 4} and found.count(2) == 1 + 2 * 4  # the draft's two, and one of them for another


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_states_fill_a_sub_block_before_the_next_one(backend, strategy):
    rules = [(even(6, 6), strategy, 1.0 if "low" in strategy else 0.1, (1, 3))]
    made = arguments(ahead=2, length=6, rules=rules, blocks_left=ints(2))
    found = [(block, bits) for block, bits, _ in graph(plan(made, backend))]
    reachable = {0, *(1 | part << 1 for part in range(3)), *(7 | part << 3 for part in range(7))}
    assert sorted(found) == sorted((block, bits) for block in range(2) for bits in reachable)


@pytest.mark.parametrize("count, swaps", [(1, 19), (4, 16 + 16 + 16 + 16), (10, 64)])
def test_no_more_continuations_are_looked_at_than_the_likeliest(backend, count, swaps):
    made = arguments(length=20, rules=[([count, 20 - count], "low_confidence_static", 0.0)], blocks_left=ints(1))
    made["log_odds"] = torch.arange(20, 0, -1.0)[None, None]
    made["order_sharpness"] = torch.full((1, 1), 1e-3)
    found = graph(plan(made | {"max_states": 100}, backend))
    continued = [bits for _, bits, _ in found[1:]]
    assert continued.count((1 << count) - 1) == 1 and len(continued) == min(64, 1 + swaps)


def test_visits_are_the_chance_of_the_order_times_that_of_the_tokens(backend):
    made = arguments(length=2, blocks_left=ints(2), draft_calibration=torch.tensor([0.5]))
    made["order_sharpness"] = torch.full((1, 1), 0.5)
    made["prob"], made["log_odds"] = torch.tensor([[[0.75, 0.5]]]), torch.tensor([[[3.0, 1.0]]])
    swapped = math.exp(-0.5 * 2.0)
    first, second = 1 / (1 + swapped) * 0.5 * 0.75, swapped / (1 + swapped) * 0.5 * 0.5
    finished = first * 0.5 * 0.5 + second * 0.5 * 0.75
    assert [bits for _, bits, _ in graph(plan(made, backend))] == [0, 1, 2, 0]
    for floor, count in (
        *((finished / 2 * 1.001, 3), (finished / 2 * 0.999, 4)),
        *((second * 1.001, 2), (second * 0.999, 3), (first * 1.001, 1), (first * 0.999, 2), (1.1, 1)),
    ):
        assert len(graph(plan(made | {"min_visit_prob": torch.tensor([floor])}, backend))) == count


def test_row_budget_goes_to_the_best_states_of_the_batch(backend):
    made = arguments(batch=2, length=4, blocks_left=ints(1, 1))
    made["prob"] = torch.tensor([0.1, 0.9])[:, None, None].expand(2, 1, 4).contiguous()
    counts = [
        (plan(made | {"row_budget": ints(rows)}, backend).block >= 0).sum(1).tolist() for rows in (0, 3, 4, 15, 16)
    ]
    assert counts == [[1, 1], [1, 1], [1, 2], [1, 4], [1, 5]]


def test_rows_of_logits_go_to_the_best_states_of_the_batch(backend):
    made = arguments(batch=2, length=4, blocks_left=ints(1, 1))
    made["prob"] = torch.tensor([0.1, 0.9])[:, None, None].expand(2, 1, 4).contiguous()
    made["log_odds"] = torch.zeros(2, 1, 4)
    made["revealed"] = torch.tensor([0, 1])  # 4 and 3 positions are masked, in the second slot's next three states 2
    counts = [
        (plan(made | {"logits_rows": 7 + spare}, backend).block >= 0).sum(1).tolist() for spare in (1, 2, 3, 4, 5, 6, 7)
    ]
    assert counts == [[1, 1], [1, 2], [1, 2], [1, 3], [1, 3], [1, 4], [1, 5]]


def test_each_slot_follows_its_own_rule(backend):
    rules = [
        (even(4, 4), "sequential", 0.0),
        (even(4, 2), "low_confidence_static", 0.0),
        (even(4, 4), "low_confidence_dynamic", 0.6),
        ([4], "entropy_bounded", 0.0),
    ]
    made = arguments(batch=4, rules=rules, blocks_left=ints(1, 1, 1, 1))
    made["prob"] = torch.tensor([0.7, 0.5, 0.7, 0.4]).expand(4, 1, 4).contiguous()
    made["log_odds"], made["order_sharpness"] = torch.logit(made["prob"]), torch.full((4, 1), 1e4)
    made["min_visit_prob"] = torch.full((4,), 1e-6)
    found = [[bits for _, bits, _ in graph(plan(made, backend), b)] for b in range(4)]
    assert found == [[0, 1, 3, 7], [0, 5], [0, 5, 7], [0]]


@pytest.mark.parametrize(
    "changes",
    [
        {"proposal_depth": ints(0)},
        {"draft_calibration": torch.zeros(1)},
        {"prob": torch.full((1, 1, 4), math.nan)},
        {"max_states": 1},
        {"row_budget": ints(3)},
        {"logits_rows": 6},
        {"min_visit_prob": torch.tensor([math.inf])},
        {"step": ints(4)},
        {"step": ints(-1)},
        {"steps": ints(0)},
        rule(4, ([0, 4], "low_confidence_static", 0.0)),
        {"revealed": torch.tensor([15])},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_current_state_alone(backend, changes):
    assert len(graph(plan(arguments() | changes, backend))) == 1


def test_next_block_follows_only_where_text_draft_and_proposal_go_on(backend):
    def deepest(**changes):
        return plan(arguments(ahead=3, **changes), backend).block.max().item()

    assert [deepest(blocks_left=ints(n)) for n in (0, 1, 2, 3, 4)] == [0, 0, 1, 2, 3]
    assert [deepest(draft_end=ints(n)) for n in (0, 1, 2, 3, NEVER)] == [0, 0, 1, 2, 3]
    assert [deepest(proposal_depth=ints(n)) for n in (0, 1, 2, 3, 9)] == [0, 1, 2, 3, 3]


def test_block_that_the_states_draws_would_not_finish_as_drafted_leads_nowhere(backend):
    made = arguments(ahead=2, draft_logits=torch.zeros(1, 2, 4, VOCABULARY), temperature=torch.zeros(1))
    made["draft_tokens"].zero_()
    assert plan(made, backend).draft_blocks_in_rows.item() == 2
    made["draft_tokens"][0, 1, 2] = 1
    assert plan(made, backend).draft_blocks_in_rows.item() == 1


def test_waiting_step_of_a_confident_draft_is_no_division_by_zero(backend):
    made = arguments(rules=[([0, 1, 1, 2], "low_confidence_dynamic", 1.0)], order_sharpness=torch.full((1, 1), 1e6))
    assert sizes(plan(made, backend)) == [0]


def test_large_blocks_fill_hundreds_of_states(backend):
    count = 8 if backend == "reference" else 512
    made = arguments(batch=2, ahead=2, length=64, rules=[(even(64, 32), "low_confidence_static", 0.9)] * 2)
    small = made | {"max_states": count, "row_budget": ints(10**7), "kv_slots": 10**5, "stride": 515}
    out = plan(small | {"logits_rows": 2 * count * 64}, backend)
    assert (out.block[:, -1] >= 0).all()


@pytest.mark.parametrize("batch, ahead", [(0, 2), (2, 0), (0, 0)])
def test_empty_batches_and_no_draft_are_fine(backend, batch, ahead):
    out = plan(arguments(batch=batch, ahead=ahead, max_states=3), backend)
    assert out.tokens.shape == (batch, (1 + ahead + 3) * 4)
    assert (out.block >= 0).sum() == batch
