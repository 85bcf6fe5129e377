"""Which partial reveals the target is shown, and that their rows see exactly what native decoding would."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from backends import callable_of
from plans import MASK, PER_SLOT_RESULTS, alone, arguments, assert_same, cases, graph, ints, plan, random_case, strided
from rules import STRATEGIES
from simsd_kernels import INF, banned_mask
from simsd_kernels.plan_block.api import copy_stride

sample_logits = callable_of("sample_logits")
LANES = ()  # slots share the rows
bounded = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


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
        made["banned"],
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
    (
        "banned",
        torch.tensor([8]),
        TypeError,
        r"banned must be torch.int32 \[1\], as simsd_kernels.banned_mask\(ids, 9\)",
    ),
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
        top_p=torch.ones(1), seed=torch.zeros(1, dtype=torch.int64), banned=banned_mask([8], 9),
    )  # fmt: skip


def test_unsupported_backends_say_why():
    with pytest.raises(RuntimeError, match="triton: this op has no triton kernel"):
        plan(arguments(), "triton")
    with pytest.raises(RuntimeError, match="got draft_logits of torch.float64"):
        logits = torch.zeros(1, 1, 4, 9, dtype=torch.float64)
        plan(arguments(draft_logits=logits, temperature=torch.zeros(1)), "cpu")


def test_opcheck():
    torch.library.opcheck(torch.ops.simsd.plan_block, (), good_arguments())
    torch.library.opcheck(torch.ops.simsd.plan_block, (), arguments(batch=2, ahead=2, max_states=4))
