"""Results leave and come back as plain values."""

from __future__ import annotations

import json

import pytest

import simsd
from simsd import Result, SimsdError, Stats
from stand_ins import random_sdar


@pytest.fixture(scope="module")
def result() -> Result:
    return simsd.generate(random_sdar(0), [[5, 3]], max_new_tokens=9, temperature=0.7, seed=-(2**63))[0]


def test_a_result_comes_back_from_json_as_it_was(result):
    values = json.loads(json.dumps(result.to_dict()))
    assert Result.from_dict(values) == result
    assert values["stats"]["target_forwards"] == result.stats.target_forwards > 0  # derived ones are there to be read
    assert len(values["logprobs"]) == len(values["draw_logprobs"]) == 9 and values["seed"] == -(2**63)
    assert len(values["cut_tokens"]) == len(values["cut_step_map"]) == len(values["cut_draw_logprobs"]) == 1


def test_a_result_written_before_draws_were_told_still_comes_back(result):
    values = result.to_dict()
    for name in ("draw_logprobs", "cut_tokens", "cut_step_map", "cut_draw_logprobs"):
        del values[name]
    again = Result.from_dict(values)
    assert again.draw_logprobs == again.cut_tokens == again.cut_step_map == again.cut_draw_logprobs == []
    again.draw_logprobs.append(0.0)
    assert Result.from_dict(values).draw_logprobs == []
    assert (again.tokens, again.logprobs, again.stats) == (result.tokens, result.logprobs, result.stats)


def test_stats_come_back_with_and_without_what_is_derived(result):
    values = result.stats.to_dict()
    del values["acceptance"]
    assert Stats.from_dict(values) == result.stats


def without(values: dict, name: str) -> dict:
    return {key: value for key, value in values.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: without(v, "seed"), "Result.from_dict lacks seed: it takes what to_dict gave"),
        (lambda v: v | {"prompt": "a"}, "Result.from_dict does not know prompt"),
        (lambda v: v | {"stats": without(v["stats"], "drafted")}, "Stats.from_dict lacks drafted"),
        (lambda v: v | {"stats": v["stats"] | {"speed": 1}}, "Stats.from_dict does not know speed"),
        (lambda v: v | {"stats": None}, "Stats.from_dict takes what to_dict gave, got NoneType"),
        (lambda v: [v], "Result.from_dict takes what to_dict gave, got list"),
        (lambda v: {}, "Result.from_dict lacks tokens, text, "),
    ],
    ids=["missing", "unknown", "missing-count", "unknown-count", "no-stats", "list", "empty"],
)
def test_other_values_are_refused_by_name(result, change, message):
    with pytest.raises(SimsdError, match=message):
        Result.from_dict(change(result.to_dict()))
