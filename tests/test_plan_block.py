"""Which partial reveals a forward copies, and that its rows see exactly what native decoding would."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import simsd_kernels
from backends import needs_compiled_ops, on_each_backend, unsafe
from plans import MASK, STRATEGIES, VOCABULARY, arguments, cases, copied, ints, plan, sizes
from simsd_kernels.plan_block import reference
from simsd_kernels.plan_block.api import copy_stride

each_backend = on_each_backend("plan_block")
each_other_backend = on_each_backend("plan_block", but="reference")
bounded = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@each_other_backend
@given(made=cases())
@bounded
def test_same_plan_as_the_reference_to_the_last_bit(backend, made):
    out, expected = plan(made, backend), plan(made, "reference")
    for name, value in expected._asdict().items():
        assert getattr(out, name).dtype == value.dtype and torch.equal(getattr(out, name), value), name


@needs_compiled_ops
@given(made=cases(logits=True))
@bounded
def test_same_plan_as_the_reference_would_make_of_the_same_draws(monkeypatch, made):
    out = plan(made, "cpu")
    with monkeypatch.context() as patched:
        patched.setattr(reference, "sample_logits", torch.ops.simsd.sample_logits.default)
        expected = plan(made, "reference")
    for name, value in expected._asdict().items():
        assert torch.equal(getattr(out, name), value), name


def draws(made, lane, block, bits, backend):
    """token of each position, as the draft draws it in a state with the set `bits`."""
    length = made["tokens"].shape[1]
    first = int(made["start"][lane]) + block * length
    key = 0 if made["strategy"] == "sequential" else bits - (bits >> 63 << 64)

    def every(name, default, dtype):
        return torch.full((length,), default if made[name] is None else made[name][lane].item(), dtype=dtype)

    return simsd_kernels.sample_logits(
        made["draft_logits"][lane, block],
        every("temperature", 0.0, torch.float32),
        every("top_k", 0, torch.int32),
        every("top_p", 1.0, torch.float32),
        every("seed", 0, torch.int64),
        torch.arange(first, first + length, dtype=torch.int32),
        torch.full((length,), key),
        made["banned_ids"],
        backend=backend,
    ).token.tolist()


@each_backend
@given(made=cases(logits=True))
@settings(bounded, max_examples=30)
def test_every_copied_state_is_reached_from_another_by_that_states_own_draws(backend, made):
    made["max_rows"] = 10**6
    out = plan(made, backend)
    length = made["tokens"].shape[1]
    full = (1 << length) - 1
    for lane in range(len(made["tokens"])):
        found = copied(out, lane)
        assert len(set(found)) == len(found)
        drawn = {state: draws(made, lane, *state[:2], backend) for state in found if state[0] < made["depth"][lane]}

        def leads(parent, bits, tokens, drawn=drawn):
            token = drawn.get(parent)
            seen = [token[i] if t is None else t for i, t in enumerate(parent[2])] if token else None
            return parent[1] & bits == parent[1] != bits and all(
                tokens[i] == seen[i] for i in range(length) if token and bits >> i & 1
            )

        for n, (block, bits, tokens) in enumerate(found):
            if n == 0:
                known = int(made["revealed"][lane]) & full
                values = made["tokens"][lane].tolist()
                assert (block, bits) == (0, known)
                assert tokens == tuple(t if known >> i & 1 else None for i, t in enumerate(values))
            elif bits == 0:
                finished = made["clean"][lane, block - 1].tolist()
                assert any(p[0] == block - 1 and leads(p, full, finished) for p in drawn)
            else:
                assert any(p[0] == block and leads(p, bits, tokens) for p in drawn)


@each_backend
@given(made=cases())
@bounded
def test_each_row_sees_the_committed_prefix_the_finished_blocks_before_it_and_its_own_copy(backend, made):
    out = plan(made, backend)
    batch, length = made["tokens"].shape
    ahead, room = made["clean"].shape[1], copy_stride(length)
    shape = (batch, ahead + made["max_copies"], length)
    slot, clock, token, position = (x.view(shape).tolist() for x in (out.slots, out.clock, out.tokens, out.positions))
    for b, start in enumerate(made["start"].tolist()):
        found = copied(out, b)
        finished = max((block for block, *_ in found), default=0)
        assert out.cleaned[b] == finished
        live = [n for n, line in enumerate(slot[b]) if line[0] >= 0]
        assert live == [*range(finished), *(ahead + n for n in range(len(found)))]
        used = [s for n in live for s in slot[b][n]]
        assert len(set(used)) == len(used)
        for n, (slots, clocks) in enumerate(zip(slot[b], clock[b], strict=True)):
            if n not in live:
                assert slots == clocks == [-1] * length
                continue
            block = n if n < ahead else found[n - ahead][0]
            first = start + block * length
            own = list(range(first, first + length))
            assert position[b][n] == own
            if n < ahead:
                assert token[b][n] == made["clean"][b, n].tolist()
            else:
                assert token[b][n] == [MASK if t is None else t for t in found[n - ahead][2]]
                own = [made["scratch"] + (n - ahead) * room + i for i in range(length)]
                assert own[0] // 256 == own[-1] // 256
                assert out.reach[b, n - ahead] > 0
            assert slots == own
            sees = (out.birth[b] <= clocks[0]) & (clocks[0] <= out.death[b])
            assert clocks == [clocks[0]] * length and sees.nonzero().flatten().tolist() == [*range(first), *own]
        assert (start < 0) == (not live)
        if start < 0:
            assert (out.birth[b] == simsd_kernels.INF).all()


@each_backend
@given(made=cases())
@bounded
def test_budgets_of_copies_and_rows_are_kept_and_the_current_state_is_always_there(backend, made):
    out = plan(made, backend)
    batch, length = made["tokens"].shape
    active = (made["start"] >= 0).sum()
    assert torch.equal(out.block[:, 0] == 0, made["start"] >= 0)
    assert (out.reach[:, 0] == (made["start"] >= 0)).all()
    assert ((out.slots >= 0).sum() - active * length) <= made["max_rows"]
    if made["max_rows"] < 10**6:
        everything = plan(made | {"max_rows": 10**6}, backend)
        for b in range(batch):
            assert copied(everything, b)[: len(copied(out, b))] == copied(out, b)


@each_backend
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_no_floor_and_ample_budgets_copy_the_whole_lattice(backend, strategy, length):
    made = arguments(ahead=2, length=length, strategy=strategy, threshold=1.0 if "low" in strategy else 0.1)
    made["blocks_left"] = ints(2)
    found = copied(plan(made, backend))
    clean = made["clean"][0].tolist()
    assert len(found) == 2 * (2**length - 1)
    for block, bits, tokens in found:
        assert tokens == tuple(t if bits >> i & 1 else None for i, t in enumerate(clean[block]))


@each_backend
def test_sequential_copies_prefixes_only(backend):
    made = arguments(ahead=2, length=6, strategy="sequential")
    found = copied(plan(made, backend))
    assert [(block, bits) for block, bits, _ in found] == [
        *((0, (1 << n) - 1) for n in range(6)),
        *((1, (1 << n) - 1) for n in range(6)),
        (2, 0),
    ]


@each_backend
def test_two_reveals_per_step_copy_even_counts_only(backend):
    found = sizes(plan(arguments(length=6, steps=3, blocks_left=ints(1)), backend))
    assert set(found) == {0, 2, 4} and found.count(2) == 1 + 2 * 4  # the draft's two, and one of them for another


@each_backend
def test_reach_is_the_chance_of_the_order_times_that_of_the_tokens(backend):
    made = arguments(length=2, power=torch.full((1, 1), 0.5), trust=torch.tensor([0.5]), blocks_left=ints(2))
    made["prob"], made["log_odds"] = torch.tensor([[[0.75, 0.5]]]), torch.tensor([[[3.0, 1.0]]])
    out = plan(made, backend)
    swapped = math.exp(-0.5 * 2.0)
    first, second = 1 / (1 + swapped) * 0.5 * 0.75, swapped / (1 + swapped) * 0.5 * 0.5
    finished = first * 0.5 * 0.5 + second * 0.5 * 0.75
    assert [bits for _, bits, _ in copied(out)] == [0, 1, 2, 0]
    torch.testing.assert_close(out.reach[0, :4], torch.tensor([1.0, first, second, finished]))
    for floor, count in ((finished / 2 * 1.01, 3), (finished / 2 * 0.99, 4), (second * 1.01, 2), (1.1, 1)):
        assert len(copied(plan(made | {"floor": floor}, backend))) == count


@each_backend
def test_row_budget_goes_to_the_best_states_of_the_batch(backend):
    made = arguments(batch=2, length=4, blocks_left=ints(1, 1))
    made["prob"] = torch.tensor([0.1, 0.9])[:, None, None].expand(2, 1, 4).contiguous()
    counts = [(plan(made | {"max_rows": rows}, backend).block >= 0).sum(1).tolist() for rows in (0, 3, 4, 15, 16)]
    assert counts == [[1, 1], [1, 1], [1, 2], [1, 4], [1, 5]]


@each_backend
@pytest.mark.parametrize(
    "changes",
    [
        {"depth": ints(0)},
        {"trust": torch.zeros(1)},
        {"prob": torch.full((1, 1, 4), math.nan)},
        {"max_copies": 1},
        {"max_rows": 3},
        {"floor": math.inf},
        {"step": ints(4)},
        {"step": ints(-1)},
        {"schedule": torch.zeros(0, dtype=torch.int32)},
        {"schedule": ints(0, 4)},
        {"revealed": torch.tensor([15])},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_current_state_alone(backend, changes):
    made = arguments() | changes
    assert len(copied(plan(made, backend))) == 1


@each_backend
def test_next_block_follows_only_where_the_draft_may_go_on(backend):
    made = arguments(ahead=3)
    deepest = [plan(made | {"blocks_left": ints(n)}, backend).block.max().item() for n in (0, 1, 2, 3, 4)]
    assert deepest == [0, 0, 1, 2, 3]
    deepest = [plan(made | {"depth": ints(n)}, backend).block.max().item() for n in (0, 1, 2, 3)]
    assert deepest == [0, 1, 2, 3]


@each_backend
def test_block_that_the_states_draws_would_not_finish_as_drafted_leads_nowhere(backend):
    logits = torch.zeros(1, 2, 4, VOCABULARY)
    made = arguments(ahead=2, draft_logits=logits)
    made["clean"].zero_()
    assert plan(made, backend).cleaned.item() == 2
    made["clean"][0, 1, 2] = 1
    assert plan(made, backend).cleaned.item() == 1


@each_backend
def test_waiting_step_of_a_confident_draft_is_no_division_by_zero(backend):
    made = arguments(
        strategy="low_confidence_dynamic", schedule=ints(0, 1, 1, 2), power=torch.full((1, 1), 1e6), threshold=1.0
    )
    assert sizes(plan(made, backend)) == [0]


@each_backend
def test_strided_arguments_and_large_blocks_change_nothing(backend):
    made = arguments(batch=2, ahead=2, length=64, steps=32, max_copies=512)
    strided = {
        name: torch.stack((value, value), dim=-1)[..., 0] if torch.is_tensor(value) else value
        for name, value in made.items()
    }
    if backend == "reference":
        made["max_copies"] = strided["max_copies"] = 8
    out = plan(made, backend)
    assert all(torch.equal(a, b) for a, b in zip(plan(strided, backend), out, strict=True))
    assert (out.block[:, -1] >= 0).all()


@each_backend
@pytest.mark.parametrize("batch, ahead", [(0, 2), (2, 0), (0, 0)])
def test_empty_batches_and_no_draft_are_fine(backend, batch, ahead):
    out = plan(arguments(batch=batch, ahead=ahead, max_copies=3), backend)
    assert out.tokens.shape == (batch, (ahead + 3) * 4)
    assert (out.block >= 0).sum() == batch


REFUSED = [
    ("tokens", torch.zeros(1, 65, dtype=torch.int64), ValueError, r"clean must be \[B, K, L\]"),
    ("tokens", torch.zeros(4, dtype=torch.int64), ValueError, r"tokens must be \[B, L\]"),
    ("tokens", torch.zeros(1, 4, dtype=torch.int32), TypeError, "tokens must be torch.int64, got torch.int32"),
    ("revealed", torch.zeros(2, dtype=torch.int64), ValueError, r"revealed must be \[B\] = \[1\], got \[2\]"),
    ("start", torch.zeros(1, dtype=torch.int64), TypeError, "start must be torch.int32"),
    ("start", ints(253), ValueError, "start must be such that the block ends by slot 256, got 253"),
    ("step", torch.zeros(1), TypeError, "step must be torch.int32"),
    ("blocks_left", ints(0, 1), ValueError, "blocks_left must be"),
    ("blocks_left", ints(63), ValueError, "blocks_left must be such that the last block ends by slot 256, got 260"),
    ("blocks_left", ints(2**30), ValueError, "blocks_left must be such that the last block ends by slot 256"),
    ("clean", torch.zeros(1, 1, 3, dtype=torch.int64), ValueError, "clean must be"),
    ("clean", torch.zeros(1, 1, 4), TypeError, "clean must be torch.int64"),
    ("depth", ints(2), ValueError, r"depth must be in \[0, 1\], got 2"),
    ("depth", ints(-1), ValueError, r"depth must be in \[0, 1\], got -1"),
    ("prob", torch.zeros(1, 2, 4), ValueError, r"prob must be \[B, K, L\]"),
    ("log_odds", torch.zeros(1, 1, 4, dtype=torch.float64), TypeError, "log_odds must be torch.float32"),
    ("entropy", 1.0, TypeError, "entropy must be a tensor"),
    ("trust", torch.tensor([1.5]), ValueError, r"trust must be in \[0, 1\], got 1.5"),
    ("draft_logits", torch.zeros(1, 1, 3, 9), ValueError, r"draft_logits must be \[B, K, L, V\]"),
    ("draft_logits", torch.zeros(1, 1, 4, 0), ValueError, "draft_logits must have at least one vocabulary entry"),
    ("draft_logits", torch.zeros(1, 1, 4, 9, dtype=torch.int32), TypeError, "draft_logits must be torch.float32 or"),
    ("temperature", torch.full((1,), -1.0), ValueError, "temperature must be finite and >= 0"),
    ("top_k", torch.zeros(1), TypeError, "top_k must be torch.int32"),
    ("top_p", torch.zeros(2), ValueError, r"top_p must be \[B\]"),
    ("seed", torch.zeros(1, dtype=torch.int32), TypeError, "seed must be torch.int64"),
    ("banned_ids", torch.tensor([9]), ValueError, r"banned_ids must be in \[0, 9\), got 9"),
    ("schedule", torch.zeros(1, 2, dtype=torch.int32), ValueError, r"schedule must be \[T\]"),
    ("strategy", "greedy", ValueError, "strategy must be one of .*got 'greedy'"),
    ("threshold", math.nan, ValueError, "threshold must be a number, got nan"),
    ("power", torch.ones(1, 2), ValueError, r"power must be \[B, K\]"),
    ("power", torch.ones(1, 1, dtype=torch.float64), TypeError, "power must be torch.float32"),
    ("power", torch.full((1, 1), -1.0), ValueError, "power must be finite and >= 0, got -1.0"),
    ("power", torch.full((1, 1), math.inf), ValueError, "power must be finite and >= 0, got inf"),
    ("floor", math.nan, ValueError, "floor must be a number >= 0, got nan"),
    ("max_copies", 0, ValueError, r"max_copies must be in 1\.\.8 for stride 11, got 0"),
    ("max_copies", 9, ValueError, r"max_copies must be in 1\.\.8 for stride 11, got 9"),
    ("max_rows", -1, ValueError, "max_rows must be >= 0, got -1"),
    ("scratch", -16, ValueError, "8 copies from slot -16 on need 112 slots"),
    ("scratch", 2**62, ValueError, "8 copies from slot .* slots"),
    ("slots", 383, ValueError, "8 copies from slot 256 on need 384 slots, got slots 383"),
    ("slots", 2**40, ValueError, "slots below"),
    ("stride", 2**25, ValueError, "64 blocks before slot 256 must stay below"),
]


def good_arguments():
    logits = torch.zeros(1, 1, 4, 9)
    return arguments(
        *(), max_copies=8, draft_logits=logits, temperature=torch.ones(1), top_k=ints(0), top_p=torch.ones(1),
        seed=torch.zeros(1, dtype=torch.int64), banned_ids=torch.tensor([8]),
    )  # fmt: skip


@pytest.mark.parametrize("name, value, error, message", REFUSED)
def test_bad_input_is_refused_by_name(name, value, error, message):
    with pytest.raises(error, match=message):
        plan(good_arguments() | {name: value})


@needs_compiled_ops
def test_compiled_op_checks_shapes_dtypes_and_every_number_that_it_writes_by():
    good = good_arguments()
    numbers = [(n, v) for n, v, *_ in REFUSED if not torch.is_tensor(v) and n != "entropy"]
    values = [(n, v) for n, v, *_ in REFUSED if n in ("start", "blocks_left", "depth", "banned_ids")]
    for name, value in [*unsafe(REFUSED, good), *numbers, *values]:
        with pytest.raises(RuntimeError, match=r"plan_block: "):
            torch.ops.simsd.plan_block(**{**good, name: value})


def test_unsupported_backends_say_why():
    with pytest.raises(RuntimeError, match="triton: "):
        plan(arguments(), "triton")
    with pytest.raises(RuntimeError, match="got draft_logits of torch.float64"):
        plan(arguments(draft_logits=torch.zeros(1, 1, 4, 9, dtype=torch.float64)), "cpu")


def test_opcheck():
    torch.library.opcheck(torch.ops.simsd.plan_block, (), good_arguments())
    torch.library.opcheck(torch.ops.simsd.plan_block, (), arguments(batch=2, ahead=2, max_copies=4))


@each_other_backend
def test_compiles_into_a_larger_graph(backend):
    def step(made, prob):
        return simsd_kernels.plan_block(**made, prob=prob * 0.5, backend=backend).tokens + 1

    made = arguments(ahead=2, max_copies=6)
    prob = made.pop("prob")
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(made, prob), step(made, prob))
