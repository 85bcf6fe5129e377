"""Which partial reveals the target is shown, and that their rows see exactly what native decoding would."""

import functools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from backends import backends, callable_of, kernels, needs_compiled_ops
from plans import (
    MASK,
    NEVER,
    PER_SLOT_RESULTS,
    VOCABULARY,
    alone,
    arguments,
    assert_same,
    cases,
    graph,
    ints,
    plan,
    random_case,
    sizes,
    strided,
)
from rules import STRATEGIES, even, rule
from simsd_kernels import INF
from simsd_kernels.plan_block import reference
from simsd_kernels.plan_block.api import copy_stride

sample_logits = callable_of("sample_logits")
LANES = ()  # slots share the rows
bounded = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@kernels
@given(made=cases())
@bounded
def test_same_plan_as_the_reference_to_the_last_bit(backend, made):
    assert_same(plan(made, backend), plan(made, "reference"))


@kernels
@given(made=cases(logits=True))
@bounded
def test_same_plan_as_the_reference_would_make_of_the_same_draws(monkeypatch, backend, made):
    out = plan(made, backend)
    with monkeypatch.context() as patched:
        patched.setattr(reference, "sample_logits", functools.partial(sample_logits, backend=backend))
        assert_same(out, plan(made, "reference"))


def test_random_cases_plan_far():
    """Of what the tests here compare, not all is the current state alone."""
    outs = [plan(random_case(n)) for n in range(200)]
    counts = torch.cat([(out.block >= 0).sum(1) for out in outs])
    assert (counts > 5).float().mean() > 0.15
    assert torch.cat([out.draft_blocks_in_rows for out in outs]).max() >= 2


def draws(made, b, block, bits, backend):
    """token of each position, as the draft draws it in a state of slot b with the set `bits`."""
    length = made["draft_tokens"].shape[2]
    first = int(made["start"][b]) + block * length
    key = 0 if made["strategy"][b] == STRATEGIES.index("sequential") else bits - (bits >> 63 << 64)

    def every(name, default, dtype):
        return torch.full((length,), default if made[name] is None else made[name][b].item(), dtype=dtype)

    return sample_logits(
        made["draft_logits"][b, block],
        every("temperature", 0.0, torch.float32),
        every("top_k", 0, torch.int32),
        every("top_p", 1.0, torch.float32),
        every("seed", 0, torch.int64),
        torch.arange(first, first + length, dtype=torch.int32),
        torch.full((length,), key),
        made["banned_ids"],
        backend=backend,
    ).token.tolist()


@given(made=cases(logits=True))
@settings(bounded, max_examples=30)
def test_every_state_is_reached_from_another_by_that_states_own_draws(backend, made):
    made["row_budget"] = ints(10**6)
    out = plan(made, backend)
    batch, ahead, length = made["draft_tokens"].shape
    full = (1 << length) - 1
    for b in range(batch):
        found = graph(out, b)
        assert len(set(found)) == len(found)
        depth = min(ahead, int(made["proposal_depth"][b]))
        drawn = {state: draws(made, b, *state[:2], backend) for state in found if state[0] < depth}

        def leads(parent, bits, tokens, drawn=drawn):
            token = drawn.get(parent)
            seen = [token[i] if t is None else t for i, t in enumerate(parent[2])] if token else None
            return parent[1] & bits == parent[1] != bits and all(
                tokens[i] == seen[i] for i in range(length) if token and bits >> i & 1
            )

        for n, (block, bits, tokens) in enumerate(found):
            if n == 0:
                known = int(made["revealed"][b]) & full
                values = made["text"][b, int(made["start"][b]) :].tolist()
                assert (block, bits) == (0, known)
                assert tokens == tuple(values[i] if known >> i & 1 else None for i in range(length))
            elif bits == 0:
                finished = made["draft_tokens"][b, block - 1].tolist()
                assert any(p[0] == block - 1 and leads(p, full, finished) for p in drawn)
            else:
                assert any(p[0] == block and leads(p, bits, tokens) for p in drawn)


@given(made=cases())
@bounded
def test_each_row_sees_the_committed_prefix_the_finished_blocks_before_it_and_its_own_copy(backend, made):
    out = plan(made, backend)
    batch, ahead, length = made["draft_tokens"].shape
    pending, scratch = made["pending"], made["scratch"]
    before = pending + ahead
    shape = (batch, before + made["max_states"], length)
    slot, clock, token, position = (x.view(shape).tolist() for x in (out.slots, out.clock, out.tokens, out.positions))
    for b, start in enumerate(made["start"].tolist()):
        found = graph(out, b)
        finished = max((block for block, *_ in found), default=0)
        assert out.draft_blocks_in_rows[b] == finished
        live = [n for n in range(pending, shape[1]) if slot[b][n][0] >= 0]
        assert live == [*range(pending, pending + finished), *(before + n for n in range(len(found)))]
        used = [s for n in live for s in slot[b][n]]
        assert len(set(used)) == len(used)
        for n in range(pending, shape[1]):
            if n not in live:
                assert slot[b][n] == clock[b][n] == [-1] * length
                continue
            block = n - pending if n < before else found[n - before][0]
            first = start + block * length
            own = list(range(first, first + length))
            assert position[b][n] == own
            if n < before:
                assert token[b][n] == made["draft_tokens"][b, block].tolist()
            else:
                assert token[b][n] == [MASK if t is None else t for t in found[n - before][2]]
                own = [scratch + (n - before) * copy_stride(length) + i for i in range(length)]
                assert own[0] // 256 == own[-1] // 256
            assert slot[b][n] == own
            now = clock[b][n][0]
            sees = (out.birth[b] <= now) & (now <= out.death[b])
            assert clock[b][n] == [now] * length and sees.nonzero().flatten().tolist() == [*range(first), *own]
        assert (start < 0) == (not live)
        if start < 0:
            assert (out.birth[b] == INF).all()


@given(made=cases())
@bounded
def test_tokens_that_wait_for_their_keys_come_along_as_block_causal_rows(backend, made):
    out = plan(made, backend)
    length = made["draft_tokens"].shape[2]
    for b, start in enumerate(made["start"].tolist()):
        rows = range(made["pending"] * length)
        waiting = list(range(int(made["kv_len"][b]), start))
        dead = len(rows) - len(waiting)
        assert out.slots[b, rows].tolist() == [*waiting, *[-1] * dead]
        assert out.positions[b, rows].tolist() == [*waiting, *[0] * dead]
        assert out.tokens[b, rows].tolist() == [*made["text"][b, waiting].tolist(), *[0] * dead]
        for row, place in enumerate(waiting):
            now = out.clock[b, row]
            sees = ((out.birth[b] <= now) & (now <= out.death[b])).nonzero().flatten().tolist()
            assert sees == list(range((place // length + 1) * length))
        assert (out.clock[b, len(waiting) : len(rows)] == -1).all()


@given(made=cases())
@bounded
def test_logits_are_asked_for_at_masked_positions_current_states_first(backend, made):
    out = plan(made, backend)
    batch, count, length = out.states.shape
    rows = out.tokens.shape[1]
    asked = [
        (n > 0, b, n, i)
        for b in range(batch)
        for n, (_, bits, _) in enumerate(graph(out, b))
        for i in range(length)
        if not bits >> i & 1
    ]
    where = torch.full((batch, count, length), -1, dtype=torch.int32)
    expected = [0] * made["logits_rows"]
    for place, (_, b, n, i) in enumerate(sorted(asked)):
        expected[place] = b * rows + rows - (count - n) * length + i
        where[b, n, i] = place
    assert out.logits_index.tolist() == expected
    assert torch.equal(out.state_rows, where)


@given(made=cases())
@bounded
def test_budgets_are_kept_for_the_best_and_the_current_state_is_always_there(backend, made):
    out = plan(made, backend)
    batch, _, length = made["draft_tokens"].shape
    assert torch.equal(out.block[:, 0] == 0, made["start"] >= 0)
    assert (out.block[:, 1:] >= 0).sum() * length <= made["row_budget"]
    added = (out.block[:, 1:] >= 0).sum() + out.draft_blocks_in_rows.sum()
    assert added * length <= made["row_budget"]
    everything = plan(made | {"row_budget": ints(10**6), "logits_rows": 10**5}, backend)
    for b in range(batch):
        assert graph(everything, b)[: len(graph(out, b))] == graph(out, b)


@given(made=cases())
@settings(bounded, max_examples=40)
def test_a_slot_gets_the_same_plan_alone_and_in_company(backend, made):
    made |= {"row_budget": ints(10**6), "logits_rows": 10**5}
    together = plan(made, backend)
    for b in range(len(made["start"])):
        by_itself = plan(alone(made, b), backend)
        for name in PER_SLOT_RESULTS:
            assert torch.equal(getattr(by_itself, name)[0], getattr(together, name)[b]), name


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


def test_what_stands_behind_the_revealed_tokens_is_of_no_meaning(backend):
    made = arguments(ahead=2, number=3, revealed=torch.tensor([5]))
    expected = plan(made, backend)
    made["text"] = made["text"].clone()
    made["text"][0, [9, 11]] = -7
    made["text"][0, 12:] = 2**40
    made["text"][0, :4] = -1
    assert_same(plan(made, backend), expected)


@given(made=cases(logits=True))
@settings(bounded, max_examples=20)
def test_columns_of_a_packed_buffer_serve_as_they_are(backend, made):
    assert_same(plan(strided(made), backend), plan(made, backend))


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


def test_arguments_are_left_as_they_were(backend):
    made = random_case(12, logits=True)
    before = {name: value.clone() for name, value in made.items() if torch.is_tensor(value)}
    plan(made, backend)
    assert all(torch.equal(made[name], value) for name, value in before.items())


REFUSED = [
    ("text", torch.zeros(4, dtype=torch.int64), ValueError, r"text must be \[B, T\]"),
    ("text", torch.zeros(1, 11, dtype=torch.int64), ValueError, "start must be at most 7, got 8"),
    ("text", torch.zeros(1, 28, dtype=torch.int32), TypeError, "text must be torch.int64, got torch.int32"),
    ("revealed", torch.zeros(2, dtype=torch.int64), ValueError, r"revealed must be \[B\] = \[1\], got \[2\]"),
    ("start", torch.zeros(1, dtype=torch.int64), TypeError, "start must be torch.int32"),
    ("start", ints(253), ValueError, "start must be at most 24, got 253"),
    ("start", ints(9), ValueError, "start must be a multiple of 4"),
    ("end", ints(257), ValueError, "end must be at most 256, got 257"),
    ("step", torch.zeros(1), TypeError, "step must be torch.int32"),
    ("kv_len", ints(3), ValueError, "kv_len must be at most 4 before start, .*got 5"),
    ("kv_len", ints(-1), ValueError, "kv_len must be >= 0, got -1"),
    ("draft_tokens", torch.zeros(1, 1, 3, dtype=torch.int64), ValueError, r"\[B, K, L\]"),
    ("draft_tokens", torch.zeros(1, 1, 65, dtype=torch.int64), ValueError, "L"),
    ("draft_tokens", torch.zeros(1, 1, 4), TypeError, "draft_tokens must be torch.int64"),
    ("proposal_depth", ints(-1), ValueError, "proposal_depth must be >= 0, got -1"),
    ("draft_end", ints(1, 1), ValueError, r"draft_end must be \[B\]"),
    ("prob", torch.zeros(1, 2, 4), ValueError, r"prob must be \[B, K, L\]"),
    ("log_odds", torch.zeros(1, 1, 4, dtype=torch.float64), TypeError, "log_odds must be torch.float32"),
    ("entropy", 1.0, TypeError, "entropy must be a tensor"),
    ("draft_calibration", torch.tensor([1.5]), ValueError, r"draft_calibration must be in \[0.0, 1.0\], got 1.5"),
    ("order_sharpness", torch.ones(1, 2), ValueError, r"order_sharpness must be \[B, K\]"),
    ("order_sharpness", torch.ones(1, 1, dtype=torch.float64), TypeError, "order_sharpness must be torch.float32"),
    ("order_sharpness", torch.full((1, 1), -1.0), ValueError, "order_sharpness must be finite and >= 0, got -1.0"),
    ("order_sharpness", torch.full((1, 1), math.inf), ValueError, "order_sharpness must be finite and >= 0, got inf"),
    ("min_visit_prob", torch.tensor([math.nan]), ValueError, "min_visit_prob must be >= 0.0, got nan"),
    ("row_budget", ints(-1), ValueError, "row_budget must be >= 0, got -1"),
    ("row_budget", ints(1, 1), ValueError, r"row_budget must be \[1\] = \[1\], got \[2\]"),
    ("schedule", torch.zeros(1, 2, dtype=torch.int32), ValueError, r"schedule must be \[B, L\]"),
    ("steps", ints(5), ValueError, r"steps must be in \[0, 4\], got 5"),
    ("strategy", ints(4), ValueError, r"strategy must be in \[0, 3\], got 4"),
    ("threshold", torch.tensor([math.nan]), ValueError, "threshold must be a number, got nan"),
    ("draft_logits", torch.zeros(1, 1, 3, 9), ValueError, r"draft_logits must be \[B, K, L, V\]"),
    ("draft_logits", torch.zeros(1, 1, 4, 0), ValueError, "draft_logits must have V >= 1"),
    ("draft_logits", torch.zeros(1, 1, 4, 9, dtype=torch.int32), TypeError, "draft_logits must be torch.float32 or"),
    ("temperature", torch.full((1,), -1.0), ValueError, "temperature must be finite and >= 0"),
    ("temperature", None, ValueError, "draft_logits need temperature, got None"),
    ("top_k", torch.zeros(1), TypeError, "top_k must be torch.int32"),
    ("top_p", torch.zeros(2), ValueError, r"top_p must be \[B\]"),
    ("seed", torch.zeros(1, dtype=torch.int32), TypeError, "seed must be torch.int64"),
    ("seed", None, ValueError, "temperature must be 0 without seed, got 1.0"),
    ("banned_ids", torch.tensor([9]), ValueError, r"banned_ids must be in \[0, 9\), got 9"),
    ("pending", -1, ValueError, "pending must be >= 0, got -1"),
    ("max_states", 0, ValueError, r"max_states must be in \[1, 8\], got 0"),
    ("max_states", 9, ValueError, r"max_states must be in \[1, 8\], got 9"),
    ("logits_rows", 3, ValueError, r"logits_rows must be in \[4, 2147483647\], got 3"),
    ("scratch", -16, ValueError, "scratch must be >= 0, got -16"),
    ("scratch", 2**62, ValueError, "must be"),
    ("kv_slots", 383, ValueError, "kv_slots must be at least 384 for 8 states from slot 256 on, got 383"),
    ("kv_slots", 2**40, ValueError, "kv_slots must be in"),
    ("stride", 2**25, ValueError, r"stride must be in \[4, 16777215\], got 33554432"),
]


def random_arguments(seed):
    return random_case(seed, logits=seed % 3 == 0)


def good_arguments():
    return arguments(
        *(), max_states=8, draft_logits=torch.zeros(1, 1, 4, 9), temperature=torch.ones(1), top_k=ints(0),
        top_p=torch.ones(1), seed=torch.zeros(1, dtype=torch.int64), banned_ids=torch.tensor([8]),
    )  # fmt: skip


@needs_compiled_ops
def test_compiled_op_checks_every_number_that_it_writes_by():
    named = ("start", "end", "kv_len", "banned_ids", "seed")
    for name, value in [*((n, v) for n, v, *_ in REFUSED if n in named), ("temperature", None)]:
        with pytest.raises(RuntimeError, match=r"plan_block: "):
            torch.ops.simsd.plan_block(**{**good_arguments(), name: value})


def test_unsupported_backends_say_why():
    with pytest.raises(RuntimeError, match="triton: this op has no triton kernel"):
        plan(arguments(), "triton")
    with pytest.raises(RuntimeError, match="got draft_logits of torch.float64"):
        logits = torch.zeros(1, 1, 4, 9, dtype=torch.float64)
        plan(arguments(draft_logits=logits, temperature=torch.zeros(1)), "cpu")


def test_opcheck():
    torch.library.opcheck(torch.ops.simsd.plan_block, (), good_arguments())
    torch.library.opcheck(torch.ops.simsd.plan_block, (), arguments(batch=2, ahead=2, max_states=4))


def assert_same_plan(made):
    before = {name: value.clone() for name, value in made.items() if torch.is_tensor(value)}
    out = plan(made, "cuda")
    assert_same(out, plan(made, "cpu"))
    for name, value in before.items():
        assert torch.equal(made[name].nan_to_num(7), value.nan_to_num(7)), name
    return out


@backends("cuda")
@pytest.mark.parametrize("logits", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize("number", range(200))
def test_random_batches(number, logits):
    made = random_case(number, logits)
    assert_same_plan(strided(made) if number % 3 == 0 else made)


@backends("cuda")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("length, steps", [(16, 16), (33, 12), (64, 64)])
def test_long_blocks(strategy, length, steps):
    out = assert_same_plan(arguments(2, 2, length, length, [(even(length, steps), strategy, 0.8)] * 2, max_states=12))
    assert (out.block >= 0).sum() > 2


@backends("cuda")
def test_a_batch_that_fights_for_its_rows_is_cut_alike():
    for number in range(8):
        made = arguments(7, 2, 4, number, max_states=20, row_budget=ints(40 + 9 * number), logits_rows=7 * 4 * 3)
        out = assert_same_plan(made)
        assert 7 < (out.block >= 0).sum() < 7 * 20


@backends("cuda")
def test_numbers_that_are_none():
    made = arguments(2, 2, 8, 3, max_states=20)
    for name in ("prob", "log_odds", "entropy"):
        made[name].view(-1)[1::3] = math.nan
        made[name].view(-1)[2::5] = math.inf
    assert_same_plan(made)


@backends("cuda")
@pytest.mark.parametrize("sizes", [(0, 2, 4), (2, 0, 4), (1, 1, 1)], ids=["no slots", "nothing drafted", "one token"])
def test_small_sizes(sizes):
    assert_same_plan(arguments(*sizes, max_states=3))


@backends("cuda")
def test_every_place_of_the_outputs_is_written():
    """Outputs start as NaN bytes: a place left out would differ from the CPU's."""
    made = arguments(3, 1, 4, max_states=5, logits_rows=3 * 4 + 7, start=ints(-1, 8, 0))
    out = assert_same_plan(made)
    assert (out.slots[0] == -1).all() and (out.clock[0] == -1).all()


@backends("emulation")
def test_launches_do_not_depend_on_what_grows(counted):
    def launches(made):
        return counted(lambda: plan(made, "cuda"))["launches"]

    few, many = (arguments(4, 2, 4, max_states=16, min_visit_prob=torch.full((4,), floor)) for floor in (1.0, 0.0))
    assert launches(few) == launches(many) == 3
    drawn = good_arguments()  # 8 states, banned ids
    assert launches(drawn) == 3 + 7 * 4
