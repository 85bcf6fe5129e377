"""Which masked positions a denoising step reveals, and that it touches nothing else."""

import json
import math
import pathlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import simsd_kernels
from backends import needs_compiled_ops, on_each_backend, unsafe

STRATEGIES = ("sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded")
GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "reveal_positions.json").read_text())["cases"]
each_backend = on_each_backend("reveal")
NAMES = ("tokens", "revealed", "step_map", "proposal", "prob", "log_odds", "entropy", "step", "schedule")


def bits(positions):
    mask = sum(1 << i for i in positions)
    return mask - (1 << 64) if mask >= 1 << 63 else mask


def positions(mask):
    return [i for i in range(64) if int(mask) >> i & 1]


def block(masked, prob=None, log_odds=None, entropy=None, step=0, schedule=(1, 1)):
    """The tensor arguments for one block (row); masked is a list of booleans."""
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
        "schedule": torch.tensor(schedule, dtype=torch.int32),
    }


def reveal(given, strategy, threshold=0.85, backend=None):
    return simsd_kernels.reveal(*(given[name] for name in NAMES), strategy, threshold, backend=backend)


def revealed_by(given, strategy, threshold=0.85, backend=None):
    """Positions that the op reveals in the only row; checks that its effects are consistent and confined."""
    before = {name: given[name].clone() for name in NAMES}
    newly = reveal(given, strategy, threshold, backend)
    chosen = positions(newly[0])
    assert int(newly[0]) == bits(chosen)
    assert int(before["revealed"][0]) & int(newly[0]) == 0
    assert int(given["revealed"][0]) == int(before["revealed"][0]) | int(newly[0])
    for i in range(given["tokens"].shape[1]):
        expected = (before["proposal"], int(before["step"][0]) + 1) if i in chosen else (before["tokens"], None)
        assert given["tokens"][0, i] == expected[0][0, i]
        assert given["step_map"][0, i] == (expected[1] if i in chosen else before["step_map"][0, i])
    for name in ("proposal", "prob", "log_odds", "entropy", "step", "schedule"):
        assert torch.equal(given[name].nan_to_num(7.0), before[name].nan_to_num(7.0)), name
    return chosen


def random_batch(seed):
    """(arguments by name, strategy, threshold) of blocks of any length in any state: ties, NaN, infinities, strides."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    batch, length, steps = pick(1, 2, 5, 9), pick(1, 2, 4, 7, 8, 16, 31, 32, 33, 48, 63, 64), pick(0, 1, 2, 3, 8)

    def any_of(*values):
        return torch.tensor(values)[torch.randint(len(values), (batch, length), generator=generator)]

    def statistic(*values):
        return any_of(*values) if pick(False, True) else torch.rand((batch, length), generator=generator) * 3 - 0.5

    given = {
        "tokens": torch.randint(-(2**62), 2**62, (batch, length), generator=generator),
        "revealed": torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator),
        "step_map": torch.randint(0, 99, (batch, length), generator=generator, dtype=torch.int32),
        "proposal": torch.randint(-(2**62), 2**62, (batch, length), generator=generator),
        "prob": statistic(0.0, 0.3, 0.6, 0.6000001, 1.0, math.nan),
        "log_odds": statistic(-math.inf, -2.0, -0.0, 0.0, 0.5, 3.0, math.inf, math.nan),
        "entropy": statistic(0.0, -0.0, 1e-12, 0.1, 0.1, 0.25, 2.0, math.nan, math.inf).abs(),
        "step": torch.randint(-1, steps + 1, (batch,), generator=generator, dtype=torch.int32),
        "schedule": torch.randint(0, pick(2, 4, 70), (steps,), generator=generator, dtype=torch.int32),
    }
    for _ in range(pick(0, 0, 1, 2)):  # fewer revealed, or none
        given["revealed"] &= torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
    if pick(False, False, True):
        given["revealed"] &= pick(0, -(2**63), 1)
    if pick(False, False, True):
        given = {name: torch.stack((value, value), dim=-1)[..., 1] for name, value in given.items()}
    return given, pick(*STRATEGIES), pick(0.0, 0.1, 0.3, 0.6, 1.0, 1.7, math.inf)


@each_backend
@pytest.mark.parametrize("number", range(len(GOLDEN)))
def test_golden_positions(backend, number):
    case = GOLDEN[number]
    length = len(case["masked"])
    given = block(case["masked"], prob=case["confidence"], schedule=(case["n"], length))
    if "entropy" in case:
        given["entropy"] = torch.tensor([case["entropy"]])
    assert revealed_by(given, case["strategy"], case["threshold"], backend) == sorted(case["positions"])


@each_backend
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_last_step_reveals_every_masked_position(backend, strategy):
    given = block([True, False, True, True], step=2, schedule=(1, 1, 1))
    assert revealed_by(given, strategy, 0.5, backend) == [0, 2, 3]


@each_backend
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("step", [-1, 2, 3, 2**31 - 1, -(2**31)])
def test_row_whose_step_is_outside_the_schedule_is_left_alone(backend, strategy, step):
    assert revealed_by(block([True] * 4, step=step), strategy, 0.5, backend) == []


@each_backend
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_full_block_has_nothing_to_reveal(backend, strategy):
    assert revealed_by(block([False] * 4), strategy, 0.5, backend) == []


@each_backend
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_block_of_64_uses_every_bit(backend, strategy):
    given = block([True] * 64, prob=[0.1] * 63 + [0.9], entropy=[1.0] * 63 + [0.01], schedule=(1, 63))
    assert revealed_by(given, strategy, 0.5, backend) == ([0] if strategy == "sequential" else [63])
    given["step"] += 1
    assert len(revealed_by(given, strategy, 0.5, backend)) == 63
    assert given["revealed"].item() == -1


@each_backend
def test_ties_go_to_the_lowest_position(backend):
    masked = [False, True, True, True, True]
    for strategy in ("low_confidence_static", "low_confidence_dynamic"):
        given = block(masked, prob=[0.9, 0.3, 0.5, 0.5, 0.5], schedule=(2, 9))
        assert revealed_by(given, strategy, 0.85, backend) == [2, 3]
    given = block(masked, entropy=[0.1, 0.9, 0.4, 0.4, 0.4], schedule=(1, 9))
    assert revealed_by(given, "entropy_bounded", 0.85, backend) == [2, 3]


@each_backend
def test_saturated_probabilities_rank_by_log_odds(backend):
    given = block([True] * 4, prob=[1.0] * 4, log_odds=[30.0, 90.0, math.inf, 40.0], schedule=(2, 9))
    assert revealed_by(given, "low_confidence_static", 0.85, backend) == [1, 2]


@each_backend
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_nan_ranks_last_but_is_revealed_rather_than_nothing(backend, strategy):
    nan = math.nan
    values = [nan, nan, 0.3, nan]
    given = block([True, True, True, True], prob=values, log_odds=values, entropy=values, schedule=(2, 9))
    assert revealed_by(given, strategy, 1.0, backend) == ([2] if strategy == "entropy_bounded" else [0, 2])
    given = block([True, True, False, True], prob=values, log_odds=values, entropy=values, schedule=(2, 9))
    assert revealed_by(given, strategy, 1.0, backend) == ([0] if strategy == "entropy_bounded" else [0, 1])


@each_backend
def test_masked_position_without_odds_comes_before_any_revealed_one(backend):
    given = block([False, True, False, True], log_odds=[5.0, -math.inf, math.inf, math.nan], schedule=(2, 9))
    assert revealed_by(given, "low_confidence_static", 0.85, backend) == [1, 3]


@each_backend
def test_dynamic_threshold_is_exclusive_and_counts_masked_positions_only(backend):
    given = block([True, True, True, False], prob=[0.5, 0.75, 0.8, 0.99], schedule=(1, 9))
    assert revealed_by(given, "low_confidence_dynamic", 0.75, backend) == [2]
    given = block([True, True, True, False], prob=[0.5, 0.75, 0.8, 0.99], schedule=(2, 9))
    assert revealed_by(given, "low_confidence_dynamic", 0.75, backend) == [1, 2]
    given = block([True, True, True, True], prob=[0.9, 0.95, 0.8, 0.99], schedule=(1, 9))
    assert revealed_by(given, "low_confidence_dynamic", 0.85, backend) == [0, 1, 3]


@each_backend
@pytest.mark.parametrize(
    "threshold, expected",
    [(0.0, [2]), (0.1, [2]), (0.11, [2]), (0.5, [0, 2]), (10.0, [0, 1, 2]), (math.inf, [0, 1, 2])],
)
def test_entropy_bounded_reveals_while_the_running_sum_is_below(backend, threshold, expected):
    given = block([True, True, True, False], entropy=[0.25, 0.5, 0.125, 0.0], schedule=(1, 9))
    assert revealed_by(given, "entropy_bounded", threshold, backend) == expected


def replay(given, strategy, threshold):
    """The rules, position by position; returns the revealed positions of one row."""
    length, steps = given["tokens"].shape[1], given["schedule"].numel()
    step = int(given["step"][0])
    if not 0 <= step < steps:
        return []
    masked = [i for i in range(length) if not int(given["revealed"][0]) >> i & 1]
    if step == steps - 1:
        return masked
    n = min(int(given["schedule"][step]), len(masked))
    worst_last = lambda value: -math.inf if math.isnan(value) else value  # noqa: E731
    odds = {i: worst_last(float(given["log_odds"][0, i])) for i in masked}
    by_odds = sorted(masked, key=lambda i: (-odds[i], i))
    match strategy:
        case "sequential":
            return masked[:n]
        case "low_confidence_static":
            return sorted(by_odds[:n])
        case "low_confidence_dynamic":
            sure = [i for i in masked if float(given["prob"][0, i]) > torch.tensor(threshold).item()]
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


@each_backend
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
        prob=row(eighths),
        log_odds=row(st.sampled_from([-math.inf, -2.0, 0.0, 1.0, 3.0, math.inf, math.nan])),
        entropy=row(eighths),
        step=data.draw(st.integers(-2, 4)),
        schedule=data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)),
    )
    threshold = data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]))
    assert replay(given, strategy, threshold) == revealed_by(given, strategy, threshold, backend)


@each_backend
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_of_a_batch_do_not_interfere(backend, strategy):
    generator = torch.Generator().manual_seed(1)
    rows = [
        block(
            (torch.rand(16, generator=generator) < 0.6).tolist(),
            prob=torch.rand(16, generator=generator).tolist(),
            entropy=torch.rand(16, generator=generator).tolist(),
            step=number % 5 - 1,
            schedule=(2, 3, 4),
        )
        for number in range(20)
    ]
    batch = {name: torch.cat([row[name] for row in rows]) for name in NAMES if name != "schedule"}
    batch["schedule"] = rows[0]["schedule"]
    newly = reveal(batch, strategy, 0.7, backend)
    for number, row in enumerate(rows):
        assert torch.equal(reveal(row, strategy, 0.7, backend), newly[number : number + 1])
        for name in ("tokens", "revealed", "step_map"):
            assert torch.equal(row[name][0], batch[name][number]), name


@each_backend
def test_strided_views_are_updated_in_place(backend):
    given = block([True, False, True, True], prob=[0.2, 0.9, 0.6, 0.7], schedule=(2, 9))
    for name in NAMES[:7]:
        value = given[name]
        given[name] = torch.stack((value, value), dim=-1)[..., 1]
    assert revealed_by(given, "low_confidence_static", 0.85, backend) == [2, 3]


@each_backend
@pytest.mark.parametrize("batch, length", [(0, 4), (3, 0), (0, 0)])
def test_empty_batches_and_blocks_are_fine(backend, batch, length):
    given = block([True])
    for name in ("tokens", "step_map", "proposal", "prob", "log_odds", "entropy"):
        given[name] = given[name].new_zeros(batch, length)
    for name in ("revealed", "step"):
        given[name] = given[name].new_zeros(batch)
    newly = reveal(given, "sequential", backend=backend)
    assert newly.shape == (batch,) and newly.dtype == torch.int64 and not newly.any()


@each_backend
def test_empty_schedule_reveals_nothing(backend):
    assert revealed_by(block([True] * 3, schedule=()), "sequential", 0.5, backend) == []


REFUSED = [
    ("tokens", torch.zeros(1, 65, dtype=torch.int64), ValueError, "L must be at most 64, got 65"),
    ("tokens", torch.zeros(1, 4, dtype=torch.int32), TypeError, "tokens must be torch.int64, got torch.int32"),
    ("tokens", torch.zeros(4, dtype=torch.int64), ValueError, r"tokens must be \[B, L\].*got \[4\]"),
    ("revealed", torch.zeros(2, dtype=torch.int64), ValueError, r"revealed must be \[B\] = \[1\], got \[2\]"),
    ("step_map", torch.zeros(1, 4, dtype=torch.int64), TypeError, "step_map must be torch.int32"),
    ("proposal", torch.zeros(1, 3, dtype=torch.int64), ValueError, r"proposal must be \[B, L\] = \[1, 4\]"),
    ("prob", torch.zeros(1, 4, dtype=torch.float64), TypeError, "prob must be torch.float32, got torch.float64"),
    ("log_odds", 3.0, TypeError, "log_odds must be a tensor, got float"),
    ("entropy", torch.zeros(2, 4), ValueError, "entropy must be"),
    ("step", torch.zeros(1, dtype=torch.int64), TypeError, "step must be torch.int32"),
    ("schedule", torch.tensor([1, -3], dtype=torch.int32), ValueError, "schedule must be >= 0, got -3"),
    ("schedule", torch.zeros(1, 2, dtype=torch.int32), ValueError, r"schedule must be \[T\]"),
    ("strategy", "greedy", ValueError, "strategy must be one of sequential, low_confidence_static.*got 'greedy'"),
    ("threshold", math.nan, ValueError, "threshold must be a number, got nan"),
    ("threshold", "0.5", ValueError, "threshold must be a number, got '0.5'"),
    ("step", torch.zeros(1, dtype=torch.int32, device="meta"), ValueError, "one device.*step on meta"),
]


@pytest.mark.parametrize("name, value, error, message", REFUSED)
def test_bad_input_is_refused_by_name_and_changes_nothing(name, value, error, message):
    good = {**block([True] * 4), "strategy": "sequential", "threshold": 0.85}
    before = good["tokens"].clone()
    with pytest.raises(error, match=message):
        simsd_kernels.reveal(**{**good, name: value})
    assert torch.equal(good["tokens"], before)


@needs_compiled_ops
def test_compiled_op_checks_shapes_and_dtypes_itself():
    good = {**block([True] * 4), "strategy": "sequential", "threshold": 0.85}
    for name, value in unsafe(REFUSED, good):
        with pytest.raises(RuntimeError, match="reveal: "):
            torch.ops.simsd.reveal(**{**good, name: value})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_opcheck(strategy):
    given = block([True, False, True, True], schedule=(2, 9))
    torch.library.opcheck(torch.ops.simsd.reveal, (*given.values(), strategy, 0.85))


@each_backend
@pytest.mark.parametrize("strategy", ["entropy_bounded"])
def test_compiles_into_a_larger_graph(backend, strategy):
    def step(*given):
        return simsd_kernels.reveal(*given, strategy, 0.85, backend=backend) + given[0].sum()

    given = block([True, False, True, True], schedule=(2, 9))
    eager = {name: value.clone() for name, value in given.items()}
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given.values()), step(*eager.values()))
    assert all(torch.equal(given[name], eager[name]) for name in NAMES)
