"""The CUDA kernels of plan_block, run on the CPU, against the definition and the C++ of the CPU."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from plans import STRATEGIES, arguments, copied, ints, plan, random_case
from simsd_kernels import dispatch
from simsd_kernels.plan_block import reference
from test_plan_block import REFUSED, good_arguments, unsafe


def wild_case(seed, logits=False):
    """`random_case`, every strategy in turn, with more lanes, deeper lookahead, harder budgets and odder numbers."""
    chance = random.Random(seed)
    pick = chance.choice
    made = random_case(seed, logits)
    if chance.random() < 0.4:  # few random cases have a batch that fights for its rows
        length = pick([2, 3, 4, 5, 8, 16, 63])
        batch, ahead, copies = pick([4, 5, 7]), pick([1, 2, 4, 6]), pick([2, 9, 33])
        made = arguments(batch, ahead, length, pick([length, 1 + length // 2]), seed, max_copies=copies)
        made["start"] = torch.tensor([pick([-5, 0, length, 2 * length]) for _ in range(batch)], dtype=torch.int32)
        made["blocks_left"] = torch.tensor([chance.randint(1, ahead + 2) for _ in range(batch)], dtype=torch.int32)
        made["depth"] = torch.tensor([chance.randint(ahead // 2, ahead) for _ in range(batch)], dtype=torch.int32)
        made["max_rows"] = chance.randint(0, batch * copies * length // 2)
        if logits:
            made |= drawn(batch, ahead, length, pick([1, 5, 40]), seed, chance)
    made["strategy"] = STRATEGIES[seed % 4]
    batch, ahead, _ = made["clean"].shape
    match pick(["as it is"] * 4 + ["power", "prob", "odds", "entropy", "trust", "schedule", "floor"]):
        case "power":
            powers = [pick([0.0, 1e-30, 7.0, 1e30]) for _ in range(batch * ahead)]
            made["power"] = torch.tensor(powers).view(batch, ahead)
        case "prob":
            made["prob"].view(-1)[1::3] = pick([0.0, 1.0, math.inf, -1.0, 1e-40])
        case "odds":
            made["log_odds"].view(-1)[::2] = pick([math.inf, -math.inf, math.nan])
        case "entropy":
            made["entropy"].view(-1)[::2] = pick([math.inf, 0.0, math.nan, -1.0])
        case "trust":
            made["trust"] = torch.tensor([pick([0.0, 1.0, 0.3]) for _ in range(batch)])
        case "schedule":
            made["schedule"] = ints(*(chance.randint(-1, 4) for _ in range(chance.randint(0, 6))))
        case "floor":
            made["floor"] = pick([math.inf, 1.0, 1e-300])
    if chance.random() < 0.3:
        made["threshold"] = pick([-math.inf, -1.0, 0.25, 0.7, 1e-3, 1.5])
    return made


def drawn(batch, ahead, length, vocabulary, seed, chance):
    generator = torch.Generator().manual_seed(seed)
    dtype = chance.choice([torch.float32, torch.bfloat16, torch.float16])
    logits = (torch.randn(batch, ahead, length, vocabulary, generator=generator) * 3).to(dtype)

    def lanes(values, dtype):
        return torch.tensor([chance.choice(values) for _ in range(batch)], dtype=dtype)

    return {
        "draft_logits": logits,
        "clean": logits.float().argmax(dim=3),
        "temperature": chance.choice([None, lanes([0.0, 0.5, 1.0], torch.float32)]),
        "seed": chance.choice([None, lanes(range(-9, 9), torch.int64)]),
        "top_k": chance.choice([None, lanes([0, 2, 7], torch.int32)]),
        "top_p": chance.choice([None, lanes([1.0, 0.8], torch.float32)]),
        "banned_ids": torch.tensor([2, 0, 2]) if vocabulary > 3 and chance.random() < 0.5 else None,
    }


def assert_same(out, expected):
    for name, value in expected._asdict().items():
        assert getattr(out, name).dtype == value.dtype and torch.equal(getattr(out, name), value), name


@pytest.mark.parametrize("seed", range(360))
def test_same_plan_as_the_definition_and_as_the_cpu_to_the_last_bit(seed):
    made = wild_case(seed)
    out = plan(made, "cuda")
    assert_same(out, plan(made, "reference"))
    assert_same(out, plan(made, "cpu"))


@pytest.mark.parametrize("seed", range(200))
def test_same_plan_as_the_definition_makes_of_the_same_draws(monkeypatch, seed):
    made = wild_case(seed, logits=True)
    out = plan(made, "cuda")
    monkeypatch.setattr(reference, "sample_logits", dispatch.operator("sample_logits", "cuda"))
    assert_same(out, plan(made, "reference"))


@pytest.mark.parametrize("seed", range(100))
def test_draws_give_the_plan_of_the_cpu_where_rounding_does_not_decide(seed):
    """Statistics in other last bits let states of nearly equal worth trade places, at the end one in for one out."""
    made = random_case(seed, logits=True) | {"max_rows": 10**6}
    out, expected = plan(made, "cuda"), plan(made, "cpu")
    for lane in range(len(made["tokens"])):
        found, wanted = worths(out, lane), worths(expected, lane)
        assert len(found) == len(wanted)
        clear = {state for state, worth in wanted.items() if worth > 1.001 * min(wanted.values())}
        assert clear <= found.keys()
        for state in clear:
            assert found[state] == pytest.approx(wanted[state], rel=1e-4)


def worths(out, lane):
    """Each copied state with its reach per copy that it costs."""
    pairs = zip(copied(out, lane), out.reach[lane].tolist(), strict=False)
    return {state: reach / (2 if state[0] > 0 and state[1] == 0 else 1) for state, reach in pairs}


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("logits", [False, True], ids=["given", "drawn"])
def test_a_lane_gets_the_same_plan_alone_and_in_company(seed, logits):
    made = wild_case(1000 + seed, logits) | {"max_rows": 10**6}
    together = plan(made, "cuda")
    whole = ("schedule", "banned_ids")
    for b in range(len(made["tokens"])):
        alone = {
            name: value[b : b + 1] if torch.is_tensor(value) and name not in whole else value
            for name, value in made.items()
        }
        assert_same(plan(alone, "cuda"), type(together)(*(x[b : b + 1] for x in together)))


@pytest.mark.parametrize("logits", [False, True], ids=["given", "drawn"])
def test_any_strides_give_the_same_plan(logits):
    for seed in range(8):
        made = wild_case(seed, logits)
        strided = {name: scattered(value) if torch.is_tensor(value) else value for name, value in made.items()}
        assert_same(plan(strided, "cuda"), plan(made, "cuda"))


def scattered(value):
    """The same values, dimensions reversed in memory and every second element of it."""
    order = list(range(value.dim()))[::-1]
    return (
        torch.stack((value, value), dim=-1).permute(-1, *order).contiguous().permute(*[i + 1 for i in order], 0)[..., 0]
    )


@pytest.mark.parametrize("length, copies", [(10, 300), (64, 90), (16, 31), (4, 15)])
def test_graphs_of_all_sizes_wherever_they_grow(length, copies):
    made = arguments(batch=2, ahead=2, length=length, number=length, max_copies=copies, floor=1e-200)
    out = plan(made, "cuda")
    assert_same(out, plan(made, "cpu"))
    assert (out.block[:, -1] >= 0).all()


@pytest.mark.parametrize("vocabulary", [1, 2, 1023, 2500])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_vocabularies_of_any_size(monkeypatch, strategy, vocabulary):
    chance = random.Random(vocabulary)
    made = arguments(batch=2, ahead=2, length=3, strategy=strategy, max_copies=6)
    made |= drawn(2, 2, 3, vocabulary, vocabulary, chance) | {"temperature": torch.tensor([0.0, 0.7])}
    out = plan(made, "cuda")
    monkeypatch.setattr(reference, "sample_logits", dispatch.operator("sample_logits", "cuda"))
    assert_same(out, plan(made, "reference"))


def launches(made):
    torch.ops.simsd_emulated.take_counters()
    plan(made, "cuda")
    return json.loads(torch.ops.simsd_emulated.take_counters())["launches"]


def test_launches_do_not_depend_on_what_is_planned():
    made = arguments(batch=2, ahead=2, max_copies=8)
    assert launches(made) == launches(made | {"depth": ints(0, 0)}) == 2
    logits = {"draft_logits": torch.randn(2, 2, 4, 30), "seed": torch.tensor([1, 2])}
    hot, cold = {"temperature": torch.ones(2)}, {"temperature": torch.zeros(2)}
    one_draw = launches(made | logits)
    draws = one_draw - 3  # of sample_logits: with no temperature, one call of it, and the rows that it is to draw
    assert launches(made | logits | hot | {"strategy": "sequential"}) == one_draw
    assert launches(made | logits | hot) == launches(made | logits | cold) == 2 + 7 * (1 + draws)


@pytest.mark.parametrize("name", ["start", "step", "blocks_left", "depth", "revealed", "trust", "power", "banned_ids"])
@pytest.mark.parametrize("value", [-(2**31), -1, 7, 2**31 - 1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_values_that_a_gpu_must_trust_write_nothing_outside(name, value, strategy):
    made = good_arguments() | {"strategy": strategy}
    made[name] = torch.full_like(made[name], value)
    out = dispatch.operator("plan_block", "cuda")(**made)
    assert out[8].shape == (1, 8) and out[8][0, 0] == (-1 if name == "start" and value < 0 else 0)


def test_bad_input_is_refused_in_the_words_of_the_cpu():
    good = good_arguments()
    numbers = [(n, v) for n, v, *_ in REFUSED if not torch.is_tensor(v) and n != "entropy"]
    for name, value in [*unsafe(REFUSED, good), *numbers]:
        words = []
        for backend in ("cpu", "cuda"):
            with pytest.raises(RuntimeError, match="plan_block: ") as refused:
                dispatch.operator("plan_block", backend)(**{**good, name: value})
            words.append(str(refused.value).splitlines()[0])
        assert words[0] == words[1]
