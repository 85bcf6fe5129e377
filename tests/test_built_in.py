"""The models that come with the package: they are the weights that their recipe's README says, and the pair for long
answers decodes questionnaires in long blocks."""

from __future__ import annotations

import hashlib
import json
import re

import pytest
from safetensors import safe_open

import simsd
from benchmarks.environment import ROOT
from simsd import questionnaires
from simsd.models.folders import BUILT_IN, LONG_PAIR, PAIR
from simsd.order.head import KEY, load_order_head

README = ROOT / "examples" / "tiny_pair" / "README.md"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def long() -> list[simsd.LoadedModel]:
    return [simsd.load(name) for name in LONG_PAIR]


def prompts(per_family: int) -> list[questionnaires.Questionnaire]:
    return [item for family in questionnaires.FAMILIES for item in questionnaires.held_out(family, per_family)]


def test_the_weights_are_those_of_the_recipe():
    told = dict(re.findall(r"`([\w-]+)` \| `([0-9a-f]{64})`", README.read_text(encoding="utf-8")))
    assert set(told) == set(BUILT_IN)
    for name, digest in told.items():
        assert hashlib.sha256((PAIR / name / "model.safetensors").read_bytes()).hexdigest() == digest, name


def test_the_order_heads_are_those_of_the_recipe(long):
    text = README.read_text(encoding="utf-8")
    told = {int(length): digest for length, digest in re.findall(r"blocks of (\d+) \| `([0-9a-f]{64})`", text)}
    files = {length: PAIR / "long-target" / f"order-{length}.safetensors" for length in told}
    assert {hashlib.sha256(file.read_bytes()).hexdigest() for file in files.values()} == set(told.values())
    shares = [[] for _ in range(4)]  # by reveals since the state seen: head and log-odds, for each length
    for length, file in files.items():
        load_order_head(file, long[0], length)
        with safe_open(file, "pt") as opened:
            kept = json.loads(opened.metadata()[KEY])["training"]["held_out"]
        for row, accuracy in zip(shares, kept, strict=True):
            row += [accuracy["head"], accuracy["rule"]]
    for n, row in enumerate(shares, 1):
        assert f"| {n} | {' | '.join(f'{share:.3f}'.lstrip('0') for share in row)} |" in text


def test_all_weights_together_are_small():
    assert sum(file.stat().st_size for file in PAIR.rglob("*") if file.is_file()) < 40e6


def test_nine_of_ten_questions_of_held_out_prompts_are_answered_right(long):
    items = prompts(10)
    answers = simsd.generate(long[0], [item.prompt for item in items], verify="none", max_new_tokens=128)
    grades = [questionnaires.score(item, answer.text) for item, answer in zip(items, answers, strict=True)]
    assert sum(grades) / len(grades) >= 0.9
    assert all(answer.finish_reason == "end" for answer in answers)


@pytest.mark.parametrize("block_length", [8, 16, 32])
def test_exact_decoding_gives_native_s_text_in_fewer_forwards_whoever_drafts(long, block_length):
    target, draft = long
    asked = [item.prompt for item in prompts(1)]

    def decode(**settings) -> list[simsd.Result]:
        return simsd.generate(target, asked, draft, block_length=block_length, max_new_tokens=128, **settings)

    native = decode(verify="none")
    for drafter in ("self", "model"):
        exact = decode(drafter=drafter, max_rows=512)
        for wanted, found in zip(native, exact, strict=True):
            assert (found.tokens, found.step_map, found.text) == (wanted.tokens, wanted.step_map, wanted.text)
        forwards, of_native = (sum(result.stats.target_forwards for result in results) for results in (exact, native))
        assert forwards < 0.9 * of_native
