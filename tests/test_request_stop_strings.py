"""Stop strings: the same cut of the same text, whoever drafts and wherever tokens and blocks end."""

from __future__ import annotations

import pytest

import simsd
from replays import PROMPTS
from simsd import SimsdError
from small_tokenizers import for_stand_ins
from stand_ins import random_sdar

MODES = {
    "native": {"verify": "none"},
    "model": {"drafter": "model", "lookahead": 3},
    "self": {"drafter": "self"},
    "auto": {},
    "temporal": {"verify": "temporal"},
}
PROMPT = PROMPTS[4]
NEW = 40


@pytest.fixture(scope="module")
def target():
    return simsd.load(random_sdar(0).model, tokenizer=for_stand_ins())


@pytest.fixture(scope="module")
def run(target, draft):
    def generate(mode="native", **settings) -> simsd.Result:
        settings = {"max_new_tokens": NEW, "temperature": 0.9, "end_token_ids": ()} | MODES[mode] | settings
        return simsd.generate(target, [PROMPT], draft, **settings)[0]

    return generate


def places(result: simsd.Result, tokenizer) -> list[int]:
    """How long the text of the first n tokens is, n from 0 on."""
    return [len(tokenizer.decode(result.tokens[:n])) for n in range(len(result.tokens) + 1)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", [3, 5])
def test_a_text_ends_before_the_first_stop_string_and_its_tokens_behind_it(target, run, mode, seed):
    """Every stretch of the text, also across the border of tokens (every one) and of blocks (every fourth)."""
    whole = run(mode, seed=seed)
    lengths = places(whole, target.tokenizer)
    stretches = [whole.text[at - 2 : at + 2] for n, at in enumerate(lengths) if n % 4 == 1 and 4 < n]
    stretches = [stretch for stretch in stretches if "\ufffd" not in stretch]
    assert len(stretches) > 3
    for stop in (stretches[:1], stretches[1:3], ["never", stretches[-1]]):
        result = run(mode, seed=seed, stop=stop)
        at, length = min((whole.text.find(s), len(s)) for s in stop if s in whole.text)
        count = next(n for n, reached in enumerate(lengths) if reached >= at + length)
        assert result.text == whole.text[:at]
        assert result.tokens == whole.tokens[:count]
        assert result.finish_reason == "stop"
        for column, of_whole in ((result.step_map, whole.step_map), (result.origins, whole.origins)):
            assert len(column) == count and (mode != "native" or column == of_whole[:count])
        assert result.probs == whole.probs[:count] and result.logprobs == whole.logprobs[:count]
        assert result.stats.new_tokens == count


def test_exact_and_native_texts_agree_in_a_batch_that_stops_here_and_there(target, draft):
    settings = {"max_new_tokens": 20, "temperature": 1.0, "seed": 3, "n": 2, "stop": ["ing", "h", "s", "aa"]}
    native = simsd.generate(target, PROMPTS[2:], verify="none", **settings)
    reasons = [result.finish_reason for result in native]
    assert 1 < reasons.count("stop") < len(reasons)
    for mode in ("model", "self", "auto"):
        exact = simsd.generate(target, PROMPTS[2:], draft, max_batch=3, **settings, **MODES[mode])
        for one, other in zip(native, exact, strict=True):
            assert (one.text, one.tokens, one.finish_reason) == (other.text, other.tokens, other.finish_reason)


def test_a_stop_string_saves_the_rest_of_the_text(run):
    whole = run(seed=3)
    stopped = run(seed=3, stop=whole.text[12:16])
    assert stopped.finish_reason == "stop"
    assert stopped.stats.target_forwards < 0.7 * whole.stats.target_forwards


def test_the_last_tokens_may_complete_one(target, run):
    whole = run(seed=3)
    lengths = places(whole, target.tokenizer)
    count = next(n for n in range(6, NEW) if "\ufffd" not in whole.text[lengths[n] - 3 : lengths[n]])
    last = whole.text[lengths[count] - 2 : lengths[count]]
    assert last not in whole.text[: lengths[count] - 2]
    result = run(seed=3, stop=last, max_new_tokens=count)
    assert (result.finish_reason, result.tokens) == ("stop", whole.tokens[:count])
    assert result.text == whole.text[: lengths[count] - 2]
    # One that is not complete when the limit comes is text.
    result = run(seed=3, stop=last + "!", max_new_tokens=count)
    assert (result.finish_reason, result.text) == ("length", whole.text[: lengths[count]])


def test_a_stop_string_before_the_end_token_comes_first(target, run):
    whole = run(seed=3)
    end = next(token for n, token in enumerate(whole.tokens) if n % 4 == 3 and n > 6 and token not in whole.tokens[:n])
    ended = run(seed=3, end_token_ids=end)
    assert ended.finish_reason == "end"
    last_word = target.tokenizer.decode(ended.tokens[:-1])[-2:]
    assert "\ufffd" not in last_word
    result = run(seed=3, end_token_ids=end, stop=last_word)
    assert (result.finish_reason, result.text) == ("stop", ended.text[: ended.text.find(last_word)])
    assert len(result.tokens) < len(ended.tokens)


@pytest.mark.parametrize("mode", MODES)
def test_tokens_and_text_that_were_streamed_are_never_taken_back(target, draft, run, mode):
    """Also where one stop string is complete and another, which begins before it, may still come."""
    settings = {"max_new_tokens": NEW, "temperature": 0.9, "seed": 3, "end_token_ids": ()} | MODES[mode]
    whole = run(mode, seed=3).text
    at = next(i for i in range(4, len(whole) - 8) if "\ufffd" not in whole[i : i + 8])
    inner, outer = whole[at + 2 : at + 4], whole[at : at + 7] + "!"
    for stop in ([inner, outer], [inner, outer[:-1]], [outer]):
        text, tokens = "", []
        for update in simsd.stream(target, [PROMPT], draft, stop=stop, **settings):
            text, tokens = text + update.text, tokens + update.tokens
            assert not any(string in text for string in stop)
        cuts = [whole.find(string) for string in stop if string in whole]
        assert update.result.text == text == (whole[: min(cuts)] if cuts else whole)
        assert update.result.tokens == tokens


def test_without_a_tokenizer_stop_strings_are_refused_in_one_line(draft):
    with pytest.raises(
        SimsdError, match="stop strings need a tokenizer, and SDARForCausalLM has none: use end_token_ids"
    ):
        simsd.generate(draft, [[1]], stop=["a"])
