"""Which masked positions a denoising step reveals, and that it touches nothing else."""

import json
import math
import pathlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arguments import Pick, copy_of, strided
from backends import backends, callable_of, compiled, needs_compiled_ops
from rules import STRATEGIES, rule
from simsd_kernels.reveal import reference

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "reveal_positions.json").read_text())["cases"]
WRITTEN = ("tokens", "revealed", "step_map")
LANES = ("tokens", "revealed", "step_map", "proposal", "prob", "log_odds", "entropy", "step", "steps", "strategy")
LANES += ("threshold", "schedule", "sub_blocks")
CASES = {"reference": 0, "cpu": 60, "cuda": 320}
reveal_op = callable_of("reveal")


def bits(positions):
    mask = sum(1 << i for i in positions)
    return mask - (1 << 64) if mask >= 1 << 63 else mask


def positions(mask):
    return [i for i in range(64) if int(mask) >> i & 1]


def block(
    masked,
    strategy="sequential",
    threshold=0.85,
    *,
    prob=None,
    log_odds=None,
    entropy=None,
    step=0,
    schedule=(1, 1),
    sub_blocks=(),
):
    """The arguments for one slot; masked is a list of booleans."""
    length = len(masked)
    prob = torch.tensor([prob or [0.5] * length])
    return {
        "tokens": torch.arange(length)[None] + 1000,
        "revealed": torch.tensor([bits(i for i in range(length) if not masked[i])]),
        "step_map": torch.zeros(1, length, dtype=torch.int32),
        "proposal": torch.arange(length)[None] + 2000,
        "prob": prob,
        "log_odds": torch.logit(prob.double()).float() if log_odds is None else torch.tensor([log_odds]),
        "entropy": torch.tensor([entropy or [1.0] * length]),
        "step": torch.tensor([step], dtype=torch.int32),
        **rule(length, (schedule, strategy, threshold, sub_blocks)),
    }


def reveal(given, backend=None):
    return reveal_op(**given, backend=backend)


def batch_of(slots):
    return {name: torch.cat([slot[name] for slot in slots]) for name in slots[0]}


def revealed_by(given, backend=None):
    """Positions that the op reveals in the only slot; checks that its effects are consistent and confined."""
    before = copy_of(given)
    newly = reveal(given, backend)
    chosen = positions(newly[0])
    assert int(newly[0]) == bits(chosen)
    assert int(before["revealed"][0]) & int(newly[0]) == 0
    assert int(given["revealed"][0]) == int(before["revealed"][0]) | int(newly[0])
    for i in range(given["tokens"].shape[1]):
        expected = (before["proposal"], int(before["step"][0]) + 1) if i in chosen else (before["tokens"], None)
        assert given["tokens"][0, i] == expected[0][0, i]
        assert given["step_map"][0, i] == (expected[1] if i in chosen else before["step_map"][0, i])
    for name in before.keys() - set(WRITTEN):
        assert torch.equal(given[name].nan_to_num(7.0), before[name].nan_to_num(7.0)), name
    return chosen


def random_batch(seed):
    """Slots with blocks in any state, each with a rule of its own: ties, NaN, infinities, strides."""
    pick = Pick(seed)
    generator = pick.generator
    batch, length = pick(1, 2, 5, 9), pick(1, 2, 4, 7, 8, 16, 31, 32, 33, 48, 63, 64)
    steps = min(pick(0, 1, 2, 3, 8), length)

    def any_of(*values):
        return torch.tensor(values)[torch.randint(len(values), (batch, length), generator=generator)]

    def statistic(*values):
        return any_of(*values) if pick(False, True) else torch.rand((batch, length), generator=generator) * 3 - 0.5

    def counts():
        return torch.randint(0, pick(2, 4, 70), (steps,), generator=generator).tolist()

    given = {
        "tokens": torch.randint(-(2**62), 2**62, (batch, length), generator=generator),
        "revealed": torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator),
        "step_map": torch.randint(0, 99, (batch, length), generator=generator, dtype=torch.int32),
        "proposal": torch.randint(-(2**62), 2**62, (batch, length), generator=generator),
        "prob": statistic(0.0, 0.3, 0.6, 0.6000001, 1.0, math.nan),
        "log_odds": statistic(-math.inf, -2.0, -0.0, 0.0, 0.5, 3.0, math.inf, math.nan),
        "entropy": statistic(0.0, -0.0, 1e-12, 0.1, 0.1, 0.25, 2.0, math.nan, math.inf).abs(),
        "step": torch.randint(-1, steps + 1, (batch,), generator=generator, dtype=torch.int32),
        **rule(length, *((counts(), pick(*STRATEGIES), pick(0.0, 0.1, 0.3, 0.6, 1.0, math.inf)) for _ in range(batch))),
    }
    for _ in range(pick(0, 0, 1, 2)):  # fewer revealed, or none
        given["revealed"] &= torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
    if pick(False, False, True):
        given["revealed"] &= pick(0, -(2**63), 1)
    given["sub_blocks"] = pick(0, -1, torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)) + torch.zeros(
        batch, dtype=torch.int64
    )
    if pick(False, False, True):
        given = strided(given)
    return given


def random_arguments(seed):
    return copy_of(random_batch(seed))


def good_arguments():
    return block([True, False, True, True], threshold=0.5)


@compiled
def test_any_batch_is_revealed_as_by_the_definition_and_the_cpu(backend, seed):
    given = random_batch(seed)
    copies = {other: copy_of(given) for other in (("reference", "cpu") if backend == "cuda" else ("reference",))}
    newly = reveal(given, backend)
    for other, copy in copies.items():
        assert torch.equal(newly, reveal(copy, other)), other
        for name, value in given.items():  # NaN equals NaN
            assert torch.equal(value.nan_to_num(7.0), copy[name].nan_to_num(7.0)), (other, name)


@pytest.mark.parametrize("number", range(len(GOLDEN)))
def test_golden_positions(backend, number):
    case = GOLDEN[number]
    length = len(case["masked"])
    statistics = {"prob": case["confidence"], "entropy": case.get("entropy")}
    given = block(case["masked"], case["strategy"], case["threshold"], **statistics, schedule=(case["n"], length))
    assert revealed_by(given, backend) == sorted(case["positions"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_last_step_reveals_every_masked_position(backend, strategy):
    given = block([True, False, True, True], strategy, 0.5, step=2, schedule=(1, 1, 1))
    assert revealed_by(given, backend) == [0, 2, 3]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("step", [-1, 2, 3, 2**31 - 1, -(2**31)])
def test_slot_whose_step_is_outside_the_schedule_is_left_alone(backend, strategy, step):
    assert revealed_by(block([True] * 4, strategy, 0.5, step=step), backend) == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_full_block_has_nothing_to_reveal(backend, strategy):
    assert revealed_by(block([False] * 4, strategy, 0.5), backend) == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_block_of_64_uses_every_bit(backend, strategy):
    statistics = {"prob": [0.1] * 63 + [0.9], "entropy": [1.0] * 63 + [0.01]}
    given = block([True] * 64, strategy, 0.5, **statistics, schedule=(1, 63))
    assert revealed_by(given, backend) == ([0] if strategy == "sequential" else [63])
    given["step"] += 1
    assert len(revealed_by(given, backend)) == 63
    assert given["revealed"].item() == -1


def test_ties_go_to_the_lowest_position(backend):
    masked = [False, True, True, True, True]
    for strategy in ("low_confidence_static", "low_confidence_dynamic"):
        given = block(masked, strategy, prob=[0.9, 0.3, 0.5, 0.5, 0.5], schedule=(2, 9))
        assert revealed_by(given, backend) == [2, 3]
    given = block(masked, "entropy_bounded", entropy=[0.1, 0.9, 0.4, 0.4, 0.4], schedule=(1, 9))
    assert revealed_by(given, backend) == [2, 3]


def test_saturated_probabilities_rank_by_log_odds(backend):
    odds = [30.0, 90.0, math.inf, 40.0]
    given = block([True] * 4, "low_confidence_static", prob=[1.0] * 4, log_odds=odds, schedule=(2, 9))
    assert revealed_by(given, backend) == [1, 2]


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_nan_ranks_last_but_is_revealed_rather_than_nothing(backend, strategy):
    nan = math.nan
    values = dict.fromkeys(("prob", "log_odds", "entropy"), [nan, nan, 0.3, nan])
    given = block([True, True, True, True], strategy, 1.0, **values, schedule=(2, 9))
    assert revealed_by(given, backend) == ([2] if strategy == "entropy_bounded" else [0, 2])
    given = block([True, True, False, True], strategy, 1.0, **values, schedule=(2, 9))
    assert revealed_by(given, backend) == ([0] if strategy == "entropy_bounded" else [0, 1])


def test_masked_position_without_odds_comes_before_any_revealed_one(backend):
    odds = [5.0, -math.inf, math.inf, math.nan]
    given = block([False, True, False, True], "low_confidence_static", log_odds=odds, schedule=(2, 9))
    assert revealed_by(given, backend) == [1, 3]


def test_dynamic_threshold_is_exclusive_and_counts_masked_positions_only(backend):
    def found(masked, prob, threshold, count):
        return revealed_by(block(masked, "low_confidence_dynamic", threshold, prob=prob, schedule=(count, 9)), backend)

    masked, prob = [True, True, True, False], [0.5, 0.75, 0.8, 0.99]
    assert found(masked, prob, 0.75, 1) == [2]
    assert found(masked, prob, 0.75, 2) == [1, 2]
    assert found([True] * 4, [0.9, 0.95, 0.8, 0.99], 0.85, 1) == [0, 1, 3]


@pytest.mark.parametrize(
    "threshold, expected",
    [(0.0, [2]), (0.1, [2]), (0.11, [2]), (0.5, [0, 2]), (10.0, [0, 1, 2]), (math.inf, [0, 1, 2])],
)
def test_entropy_bounded_reveals_while_the_running_sum_is_below(backend, threshold, expected):
    entropy = [0.25, 0.5, 0.125, 0.0]
    given = block([True, True, True, False], "entropy_bounded", threshold, entropy=entropy, schedule=(1, 9))
    assert revealed_by(given, backend) == expected


@pytest.mark.parametrize(
    "strategy, expected",
    [
        ("sequential", [[2], [3], [4], [5], [6], [7]]),
        ("low_confidence_static", [[3], [2], [5], [4], [7], [6]]),
        ("low_confidence_dynamic", [[3], [2], [5], [4], [6, 7]]),
        ("entropy_bounded", [[2], [3], [4, 5], [6, 7]]),
    ],
)
def test_a_step_reveals_nothing_behind_the_leftmost_sub_block_that_has_a_mask(backend, strategy, expected):
    """Blocks of 8 in sub-blocks of 4 and 2 whose last ones are the surest."""
    given = block(
        [False, False, True, True, True, True, True, True],
        strategy,
        0.65,
        prob=[0.9, 0.9, 0.1, 0.3, 0.2, 0.6, 0.7, 0.8],
        entropy=[0.0, 0.0, 0.4, 0.6, 0.3, 0.3, 0.1, 0.1],
        schedule=[1] * 8,
        sub_blocks=(0, 4, 6),
    )
    for positions_ in expected:
        assert revealed_by(given, backend) == positions_
        given["step"] += 1
    assert given["revealed"].item() == 255


def test_a_sub_block_gives_no_more_than_it_has(backend):
    for strategy in STRATEGIES[:3]:
        given = block([True] * 8, strategy, 1.0, schedule=(6, 9), sub_blocks=(4,))
        assert revealed_by(given, backend) == [0, 1, 2, 3]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sub_blocks_end_with_the_block_and_the_last_step(backend, strategy):
    prob, entropy = [0.1] * 63 + [0.9], [1.0] * 63 + [0.01]
    given = block([True] * 64, strategy, 0.5, prob=prob, entropy=entropy, schedule=(1, 1, 64), sub_blocks=(1, 63))
    assert revealed_by(given, backend) == [0]
    given["step"] += 1
    assert revealed_by(given, backend) == [1]
    given["step"] += 1
    assert revealed_by(given, backend) == list(range(2, 64))  # however many sub-blocks are left
    only_last = block([False] * 63 + [True], strategy, 0.5, prob=prob, entropy=entropy, sub_blocks=(63,))
    assert revealed_by(only_last, backend) == [63]


@pytest.mark.parametrize("number", range(5))
def test_without_sub_blocks_a_block_is_one(backend, number):
    given = random_batch(number)
    given["sub_blocks"] = torch.zeros_like(given["sub_blocks"])
    left_out, beginning = copy_of(given), copy_of(given)
    del left_out["sub_blocks"]
    beginning["sub_blocks"] += 1
    newly = reveal(given, backend)
    assert torch.equal(newly, reveal(left_out, backend)) and torch.equal(newly, reveal(beginning, backend))


def replay(given):
    """The rules, position by position; returns the revealed positions of the only slot."""
    length, step, steps = given["tokens"].shape[1], int(given["step"]), int(given["steps"])
    strategy, threshold = STRATEGIES[int(given["strategy"])], float(given["threshold"])
    if not 0 <= step < steps:
        return []
    masked = [i for i in range(length) if not int(given["revealed"][0]) >> i & 1]
    if step == steps - 1:
        return masked
    begins = [i for i in range(length) if int(given["sub_blocks"]) >> i & 1]
    behind = [i for i in begins if masked and i > masked[0]]
    masked = [i for i in masked if not behind or i < behind[0]]
    n = min(int(given["schedule"][0, step]), len(masked))
    worst_last = lambda value: -math.inf if math.isnan(value) else value  # noqa: E731
    odds = {i: worst_last(float(given["log_odds"][0, i])) for i in masked}
    by_odds = sorted(masked, key=lambda i: (-odds[i], i))
    match strategy:
        case "sequential":
            return masked[:n]
        case "low_confidence_static":
            return sorted(by_odds[:n])
        case "low_confidence_dynamic":
            sure = [i for i in masked if float(given["prob"][0, i]) > threshold]
            return sure if len(sure) >= n else sorted(by_odds[:n])
    entropy = {i: -worst_last(-float(given["entropy"][0, i])) for i in masked}
    order = sorted(masked, key=lambda i: (entropy[i], i))
    total, k = 0.0, 0
    for i in order:
        total += entropy[i]
        if not total < threshold:
            break
        k += 1
    return sorted(order[: max(k, 1)])


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_block_behaves_as_the_replay(backend, strategy, data):
    length = data.draw(st.integers(1, 10))

    def row(values):
        return data.draw(st.lists(values, min_size=length, max_size=length))

    eighths = st.sampled_from([i / 8 for i in range(9)] + [math.nan])  # many ties, and sums without rounding
    given = block(
        row(st.booleans()),
        strategy,
        data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0])),
        prob=row(eighths),
        log_odds=row(st.sampled_from([-math.inf, -2.0, 0.0, 1.0, 3.0, math.inf, math.nan])),
        entropy=row(eighths),
        step=data.draw(st.integers(-2, 4)),
        schedule=data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=min(4, length))),
        sub_blocks=data.draw(st.sets(st.integers(0, length - 1))),
    )
    assert replay(given) == revealed_by(given, backend)


def test_slots_of_a_batch_have_their_own_rules_and_do_not_interfere(backend):
    generator = torch.Generator().manual_seed(1)
    slots = [
        block(
            (torch.rand(16, generator=generator) < 0.6).tolist(),
            STRATEGIES[number % 4],
            [0.3, 0.7, 2.0][number % 3],
            prob=torch.rand(16, generator=generator).tolist(),
            entropy=torch.rand(16, generator=generator).tolist(),
            step=number % 5 - 1,
            schedule=[(2, 3, 4), (5, 1), (16,), (1, 1, 1, 2)][number // 4 % 4],
        )
        for number in range(60)
    ]
    batch = batch_of(slots)
    newly = reveal(batch, backend)
    for number, slot in enumerate(slots):
        assert torch.equal(reveal(slot, backend), newly[number : number + 1])
        for name in WRITTEN:
            assert torch.equal(slot[name][0], batch[name][number]), name


@pytest.mark.parametrize("number", range(20))
def test_strided_views_are_updated_in_place(backend, number):
    given = random_batch(number)
    views = strided(given)
    assert torch.equal(reveal(given, backend), reveal(views, backend))
    assert all(torch.equal(given[name], views[name]) for name in WRITTEN)


@pytest.mark.parametrize("batch, length", [(0, 4), (3, 0), (0, 0)])
def test_empty_batches_and_blocks_are_fine(backend, batch, length):
    given = {
        name: value.new_zeros((batch, length) if value.dim() == 2 else (batch,))
        for name, value in block([True], schedule=(1,)).items()
    }
    newly = reveal(given, backend)
    assert newly.shape == (batch,) and newly.dtype == torch.int64 and not newly.any()


def test_schedule_without_steps_reveals_nothing(backend):
    assert revealed_by(block([True] * 3, schedule=()), backend) == []


REFUSED = [
    ("tokens", torch.zeros(1, 4, dtype=torch.int32), TypeError, "tokens must be torch.int64, got torch.int32"),
    ("tokens", torch.zeros(4, dtype=torch.int64), ValueError, r"tokens must be \[B, L\].*got \[4\]"),
    ("revealed", torch.zeros(2, dtype=torch.int64), ValueError, r"revealed must be \[B\] = \[1\], got \[2\]"),
    ("step_map", torch.zeros(1, 4, dtype=torch.int64), TypeError, "step_map must be torch.int32"),
    ("proposal", torch.zeros(1, 3, dtype=torch.int64), ValueError, r"proposal must be \[B, L\] = \[1, 4\]"),
    ("prob", torch.zeros(1, 4, dtype=torch.float64), TypeError, "prob must be torch.float32, got torch.float64"),
    ("log_odds", 3.0, TypeError, "log_odds must be a tensor, got float"),
    ("entropy", torch.zeros(2, 4), ValueError, "entropy must be"),
    ("step", torch.zeros(1, dtype=torch.int64), TypeError, "step must be torch.int32"),
    ("schedule", torch.tensor([[1, -3, 0, 0]], dtype=torch.int32), ValueError, "schedule must be >= 0, got -3"),
    ("schedule", torch.zeros(4, dtype=torch.int32), ValueError, r"schedule must be \[B, L\]"),
    ("schedule", torch.zeros(1, 2, dtype=torch.int32), ValueError, r"schedule must be \[B, L\] = \[1, 4\]"),
    ("steps", torch.tensor([5], dtype=torch.int32), ValueError, r"steps must be in \[0, 4\], got 5"),
    ("steps", torch.tensor([1.0]), TypeError, "steps must be torch.int32"),
    ("strategy", "sequential", TypeError, "strategy must be a tensor, got str"),
    ("strategy", torch.tensor([4], dtype=torch.int32), ValueError, r"strategy must be in \[0, 3\], got 4"),
    ("threshold", torch.tensor([math.nan]), ValueError, "threshold must be a number, got nan"),
    ("threshold", 0.5, TypeError, "threshold must be a tensor, got float"),
    ("threshold", torch.zeros(2), ValueError, r"threshold must be \[B\] = \[1\]"),
    ("sub_blocks", torch.zeros(1, dtype=torch.int32), TypeError, "sub_blocks must be torch.int64, got torch.int32"),
    ("sub_blocks", torch.zeros(1, 4, dtype=torch.int64), ValueError, r"sub_blocks must be \[B\].*got \[1, 4\]"),
    ("sub_blocks", 8, TypeError, "sub_blocks must be a tensor, got int"),
    ("step", torch.zeros(1, dtype=torch.int32, device="meta"), ValueError, "one device.*step on meta"),
]


@pytest.mark.parametrize("length", [65, 100])
def test_block_longer_than_a_set_of_64_is_refused(length):
    with pytest.raises(ValueError, match=f"L must be at most 64, got {length}"):
        reveal(block([True] * length) | {"revealed": torch.zeros(1, dtype=torch.int64)})


@needs_compiled_ops
@pytest.mark.parametrize("name", ["step", "steps", "strategy", "schedule", "revealed", "sub_blocks"])
@pytest.mark.parametrize("value", [-(2**31), -1, 5, 2**31 - 1])
def test_compiled_op_survives_any_number_and_the_definition_agrees(name, value):
    given = block([True, False, True, True], step=1, schedule=(1, 1, 9))
    given[name] = torch.full_like(given[name], value)
    expected = copy_of(given)
    newly = torch.ops.simsd.reveal(**given)
    assert torch.equal(newly, reference.reveal(**expected))
    assert all(torch.equal(given[name], expected[name]) for name in WRITTEN)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_opcheck(strategy):
    given = block([True, False, True, True], strategy, schedule=(2, 9))
    torch.library.opcheck(torch.ops.simsd.reveal, tuple(given.values()))


@pytest.mark.parametrize("number", range(0, 320, 10))
def test_slot_is_the_same_alone_and_in_company(backend, number):
    given = random_batch(number)
    alone = [{name: value[b : b + 1].clone() for name, value in given.items()} for b in range(given["tokens"].shape[0])]
    newly = reveal(given, backend)
    for b, slot in enumerate(alone):
        assert reveal(slot, backend).item() == newly[b]
        for name in WRITTEN:
            assert torch.equal(slot[name][0], given[name][b]), name


def test_running_sum_is_float64_in_order_of_rank(backend):
    """Sums of entropies that no float32 tells from the bound."""
    entropy = [0.5, 0.25, *[2.0**-40] * 58, 1.0, math.nan, math.inf, 0.0]
    given = batch_of(
        [
            block([True] * 64, strategy, threshold, prob=[0.75] * 64, entropy=entropy, schedule=(3, 9))
            for strategy in STRATEGIES
            for threshold in (0.0, 0.75, 0.75 + 2.0**-23, math.inf, -math.inf)
        ]
    )
    expected = copy_of(given)
    newly = reveal(given, backend)
    assert torch.equal(newly, reveal(expected, "reference"))
    just_above = positions(newly[17])  # with the sum of all but the largest
    assert len(just_above) == 61 and 60 not in just_above and positions(newly[15]) == [63]


@backends("emulation")
def test_one_launch_with_a_warp_per_block(counted):
    given = random_batch(5)
    counters = counted(lambda: reveal(given, "cuda"))
    assert counters["launches"] == 1 and counters["blocks"] == given["tokens"].shape[0]
