"""The measuring of `simsd bench`: which modes, in which order, checked before anything runs."""

from __future__ import annotations

import pytest

import simsd
from simsd import benchmarking, questionnaires, tasks
from simsd.benchmarking import MODES, BatchMeasurement, ForwardClock, Item, Measurement
from stand_ins import random_sdar

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pair() -> tuple[simsd.LoadedModel, simsd.LoadedModel]:
    return random_sdar(0), random_sdar(1, hidden_size=16)


@pytest.fixture
def decoded(monkeypatch) -> list[tuple[str, int]]:
    """(mode, batch size) of every sequence that was decoded, in order."""
    log = []

    class Recorded(simsd.Decoder):
        def __init__(self, target, prompts, draft, config, seeds, max_batch):
            super().__init__(target, prompts, draft, config, seeds, max_batch=max_batch)
            mode = next(mode for mode in MODES if benchmarking.mode_config(mode, config) == config)
            self.entry = mode, max_batch

        def __iter__(self):
            for update in super().__iter__():
                if update.result is not None:
                    log.append(self.entry)
                yield update

    monkeypatch.setattr(benchmarking, "Decoder", Recorded)
    return log


def own(*prompts: list[int], family: str = "own") -> list[Item]:
    return [Item(family, prompt) for prompt in prompts]


def config(**settings) -> simsd.GenerationConfig:
    return simsd.GenerationConfig(**({"max_new_tokens": 8, "verify": "temporal"} | settings))


# Modes


def test_all_modes_are_compared_by_default_and_without_a_draft_those_that_need_none():
    assert benchmarking.choose_modes(None, True) == list(MODES)
    assert benchmarking.choose_modes(None, False) == ["native", "exact-self", "exact-auto"]


@pytest.mark.parametrize("names", [["exact-auto", "temporal"], ["exact-auto", "native", "temporal"]])
def test_native_is_always_in_and_first(names):
    assert benchmarking.choose_modes(names, True) == ["native", "exact-auto", "temporal"]


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["exact"], "native, temporal, temporal-mrs, exact-model, exact-self, exact-auto; got exact"),
        (["temporal", "temporal"], "once each, got temporal, temporal"),
        ([], "none"),
        ([""], "got none"),
    ],
)
def test_bad_mode_names_are_refused(names, part):
    with pytest.raises(simsd.SimsdError, match=part):
        benchmarking.choose_modes(names, True)


def test_modes_that_need_a_draft_say_so():
    with pytest.raises(simsd.SimsdError, match="temporal, exact-model need a draft model"):
        benchmarking.choose_modes(["temporal", "exact-self", "exact-model"], False)


def test_settings_of_the_temporal_verifier_stay_with_it():
    given = config(rejected_tail="draft_argmax", end_gate=0.5, steps=2, lookahead=3)
    configs = {mode: benchmarking.mode_config(mode, given) for mode in MODES}
    assert {mode: c.verify for mode, c in configs.items()} == {
        "native": "none",
        "temporal": "temporal",
        "temporal-mrs": "temporal",
        "exact-model": "exact",
        "exact-self": "exact",
        "exact-auto": "exact",
    }
    assert [configs[mode].accept for mode in ("temporal", "temporal-mrs")] == ["match", "mrs"]
    assert [configs[f"exact-{name}"].drafter for name in ("model", "self", "auto")] == ["model", "self", "auto"]
    for mode, c in configs.items():
        assert (c.rejected_tail == "draft_argmax") == mode.startswith("temporal")
        assert (c.end_gate, c.steps, c.lookahead) == (0.5 if mode.startswith("temporal") else 0.0, 2, 3)


# Order


def test_modes_take_turns_prompt_by_prompt_after_a_round_that_is_thrown_away(pair, decoded):
    items = own([1, 2, 3], [4, 5], [6], [7])
    measured = list(benchmarking.compare(*pair, items, config(), ["exact-auto", "temporal"]))
    a, b, c = "native", "exact-auto", "temporal"
    assert [mode for mode, _ in decoded] == [*(a, b, c), *(a, b, c), *(b, c, a), *(c, a, b), *(a, b, c)]
    assert [m.item for m in measured] == items
    assert all(list(m.results) == list(m.seconds) == [a, b, c] for m in measured)  # whatever the turns were


def test_batches_run_family_by_family_in_opposite_orders(pair, decoded):
    items = own([1, 2, 3], [4, 5], [6], family="x") + own([7], [8, 9], family="y")
    measured = list(benchmarking.compare(*pair, items, config(), ["native", "exact-self"], [1, 2]))
    kinds = [(type(m), m.batch, len(m.items)) if isinstance(m, BatchMeasurement) else type(m) for m in measured]
    assert kinds == [
        *[Measurement] * 3,
        *[(BatchMeasurement, 2, 3)] * 2,
        *[Measurement] * 2,
        *[(BatchMeasurement, 2, 2)] * 2,
    ]
    warm_up, rest = decoded[:6], decoded[6:]
    assert warm_up == [("native", 1), ("exact-self", 1), *[("native", 2)] * 2, *[("exact-self", 2)] * 2]
    x, y = rest[6:18], rest[22:]  # behind 3 and 2 items one at a time
    n, e = ("native", 2), ("exact-self", 2)
    assert x == [*[n] * 3, *[e] * 3, *[e] * 3, *[n] * 3]
    assert y == [*[e] * 2, *[n] * 2, *[n] * 2, *[e] * 2]


# Results


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_mode_gives_what_generate_gives_alone_and_in_a_batch(pair, temperature):
    prompts = [[1, 2, 3], [9] * 6]
    given = config(temperature=temperature, seed=3, max_rows=24)
    measured = list(benchmarking.compare(*pair, own(*prompts), given, list(MODES), [2]))
    single, batched = measured[:2], measured[2:]
    for mode in MODES:
        results = simsd.generate(pair[0], prompts, pair[1], benchmarking.mode_config(mode, given), max_batch=1)
        wanted = [r.tokens for r in results]
        assert [m.results[mode].tokens for m in single] == wanted
        assert all([r.tokens for r in m.results[mode]] == wanted for m in batched)
        assert all(m.seconds[mode] > 0 for m in measured)
    assert len(batched) == benchmarking.ROUNDS
    assert all(m.target_forward_seconds > 0 and m.draft_forward_seconds > 0 for m in single)


def test_at_temperature_zero_mrs_is_match(pair):
    measured = list(benchmarking.compare(*pair, own([1, 2, 3], [4]), config(), ["temporal", "temporal-mrs"]))
    for m in measured:
        match, mrs = m.results["temporal"], m.results["temporal-mrs"]
        assert match.tokens == mrs.tokens and match.stats.drafted == mrs.stats.drafted > 0
        assert match.stats.accepted == mrs.stats.accepted and match.stats.target_forwards == mrs.stats.target_forwards


def test_a_seed_per_item_stays_with_its_item(pair):
    items = own([1, 2], family="x") + own([3], family="y") + own([1, 2], family="x")
    given = config(temperature=1.0, seed=(5, 6, 7))
    measured = list(benchmarking.compare(pair[0], None, items, given, ["native"]))
    alone = [
        simsd.generate(pair[0], [m.item.prompt], None, config(temperature=1.0, seed=seed, verify="none"))[0].tokens
        for m, seed in zip(measured, (5, 7, 6), strict=True)
    ]
    assert [m.results["native"].tokens for m in measured] == alone and alone[0] != alone[1]


def test_without_a_draft_the_target_drafts_for_itself(pair):
    modes = benchmarking.choose_modes(None, False)
    (measured,) = benchmarking.compare(pair[0], None, own([1, 2, 3]), config(), modes)
    assert measured.results["exact-auto"].stats.drafted and measured.draft_forward_seconds is None


# Refused before anything is decoded


@pytest.mark.parametrize(
    ("prompts", "settings", "part"),
    [
        ([[1], [1] * 600], {}, "512 positions"),
        ([[1]], {"steps": 9}, "block length 4"),
    ],
    ids=["too long", "too many steps"],
)
def test_every_prompt_is_checked_before_any_is_decoded(pair, decoded, prompts, settings, part):
    with pytest.raises(simsd.SimsdError, match=part):
        next(benchmarking.compare(*pair, own(*prompts), config(**settings), list(MODES)))
    assert decoded == []


@pytest.mark.parametrize("batches", [[0], [1, -2], [1.5]])
def test_bad_batch_sizes_are_refused(pair, batches):
    with pytest.raises(simsd.SimsdError, match="batch sizes"):
        next(benchmarking.compare(*pair, own([1]), config(), ["native"], batches))


def test_modes_that_need_a_draft_are_refused_without_one(pair):
    with pytest.raises(simsd.SimsdError, match="temporal need a draft"):
        next(benchmarking.compare(pair[0], None, own([1]), config(), ["temporal"]))


@pytest.mark.parametrize(("families", "count"), [(["maths"], 1), ([], 1), (["facts", "facts"], 1), (["facts"], 0)])
def test_bad_choice_of_items_is_refused(families, count):
    with pytest.raises(simsd.SimsdError):
        benchmarking.task_items(families, count)


def test_task_items_are_held_out_and_graded():
    items = benchmarking.task_items(["facts", "choice"], 3)
    assert [item.family for item in items] == ["facts"] * 3 + ["choice"] * 3
    (task,) = tasks.held_out("facts", 1)
    assert items[0].prompt == task.prompt
    assert items[0].grade(task.response) and not items[0].grade("The capital of France is Oslo.")


def test_items_of_the_pair_for_long_answers_are_questionnaires_graded_by_question():
    items = benchmarking.task_items(["facts", "choice"], 3, target="long-target")
    (asked,) = questionnaires.held_out("facts", 1)
    assert len(items) == 6 and items[0].prompt == asked.prompt
    first = asked.response.partition("\n")[0]
    assert items[0].grade(asked.response) == 1 and items[0].grade(first) == 1 / len(asked.questions)


# The clock


@pytest.mark.parametrize("length", [4, 6])
def test_the_clock_runs_forwards_of_one_block(length):
    model = random_sdar(0)
    rows, contexts = [], []
    clock = ForwardClock(model, length, capacity=48)
    forward = clock.runner.forward

    def seen(tokens, positions, *rest):
        logits = forward(tokens, positions, *rest)
        rows.append((clock.runner.rows, len(logits)))
        contexts.append(int(positions.min()))
        return logits

    clock.runner.forward = seen
    assert clock.seconds(0) > 0 and clock.seconds(40) > 0
    assert rows == [(length, length)] * 2 * (1 + ForwardClock.REPEATS)
    assert contexts == [0] * (1 + ForwardClock.REPEATS) + [40] * (1 + ForwardClock.REPEATS)
