"""A request on its way: where its text ends, and what updates and results tell of it meanwhile."""

from __future__ import annotations

import math

import pytest

import simsd
from replays import PROMPTS
from simsd import SamplingParams
from simsd.engine.request import MAX_FAILURES, Request
from simsd.models.tokenizer import Tokenizer
from small_tokenizers import for_stand_ins
from stand_ins import MASK

A, B, C, D = range(4)  # the tokens of "a", "b", "c" and "d"


@pytest.fixture(scope="module")
def tokenizer():
    backend = for_stand_ins()
    return Tokenizer(backend, len(backend), MASK)


def made(prompt=(30, 31), new: int = 8, ends=(), tokenizer=None, **params) -> Request:
    return Request(7, list(prompt), SamplingParams(max_new_tokens=new, **params), 3, tuple(ends), tokenizer)


def commit(request: Request, *tokens: int, prob: float = 0.5, logprobs=None) -> None:
    count = len(tokens)
    request.commit(tokens, [1] * count, [prob] * count, [-0.5] * count, ["denoised"] * count, logprobs)


def columns(request: Request) -> set[int]:
    told = (request.steps, request.probs, request.logprobs, request.draw_logprobs, request.origins)
    return {len(x) for x in (request.new, *told)}


def test_what_is_committed_is_appended_with_all_that_is_told_of_it():
    request = made()
    request.commit([A, B], [1, 2], [0.5, 0.25], [-0.5, 0.0], ["denoised", "drafted"])
    request.commit([C], [3], [0.0], [-9.0], ["tail"], [-200.0])
    assert request.new == [A, B, C] and request.tokens == [30, 31, A, B, C]
    assert (request.steps, request.probs) == ([1, 2, 3], [0.5, 0.25, 0.0])
    assert request.logprobs == [math.log(0.5), math.log(0.25), -200.0]
    assert request.draw_logprobs == [-0.5, 0.0, -9.0]
    assert request.origins == ["denoised", "drafted", "tail"] and request.finish_reason is None


@pytest.mark.parametrize(
    ("new", "tokens", "kept", "reason"),
    [
        (3, [A, B, C, D], [A, B, C], "length"),
        (4, [A, B, C, D], [A, B, C, D], "length"),
        (5, [A, B, C, D], [A, B, C, D], None),
        (4, [A, 50, C, D], [A, 50], "end"),
        (4, [A, 51, 50, D], [A, 51], "end"),
        (2, [A, 50, C, D], [A, 50], "end"),  # an end token that is the last one, too
        (1, [A, 50, C, D], [A], "length"),
        (4, [50], [50], "end"),
    ],
)
def test_a_text_ends_behind_the_first_end_token_or_at_its_limit(new, tokens, kept, reason):
    request = made(new=new, ends=(50, 51))
    commit(request, *tokens)
    assert (request.new, request.finish_reason) == (kept, reason)
    assert columns(request) == {len(kept)}


def test_an_end_token_in_the_prompt_does_not_end_the_text(target):
    request = made(prompt=(50, A), ends=(50,))
    commit(request, B)
    assert request.finish_reason is None
    [free] = simsd.generate(target, [[1, 5]], max_new_tokens=3, end_token_ids=())
    [result] = simsd.generate(target, [[1, 5]], max_new_tokens=3, end_token_ids=[5])
    assert 5 not in free.tokens and result.tokens == free.tokens


def test_a_request_for_nothing_is_done_at_once():
    request = made(new=0)
    assert request.finish_reason == "length" and request.result().tokens == []


def test_decoding_ends_behind_the_first_end_token(target):
    [full] = simsd.generate(target, [PROMPTS[3]], max_new_tokens=16)
    token, at = next((t, i) for i, t in enumerate(full.tokens) if i % 4 == 1 and t not in full.tokens[:i])
    [ended] = simsd.generate(target, [PROMPTS[3]], max_new_tokens=16, end_token_ids=[token])
    assert ended.tokens == full.tokens[: at + 1] and ended.finish_reason == "end"
    assert ended.probs == full.probs[: at + 1] and len(ended.step_map) == len(ended.origins) == at + 1


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_limit_inside_a_block_cuts_it(target, count):
    [full] = simsd.generate(target, [PROMPTS[1]], max_new_tokens=12)
    [result] = simsd.generate(target, [PROMPTS[1]], max_new_tokens=count)
    assert result.tokens == full.tokens[:count] and result.finish_reason == "length"


def test_updates_bring_every_token_once():
    request = made()
    commit(request, A, B)
    assert request.take() == ([A, B], None) and request.take() == ([], None)
    commit(request, C)
    assert request.take() == ([C], None)


def test_errors_in_a_row_fail_a_request_and_the_last_one_is_its_own():
    request = made()
    commit(request, A, B)
    for n in range(MAX_FAILURES):
        assert request.finish_reason is None and request.runs_alone == (n == MAX_FAILURES - 1)
        request.stumble(f"error {n}")
    result = request.result()
    assert (result.finish_reason, result.error) == ("failed", f"error {MAX_FAILURES - 1}")
    assert result.tokens == [A, B]


def test_a_request_that_has_ended_does_not_fail():
    request = made(new=2)
    commit(request, A, B)
    request.fail("too late")
    assert (request.finish_reason, request.error) == ("length", None)


def test_tokens_whose_text_cannot_be_decoded_are_kept_and_the_tokenizer_is_left_alone(tokenizer, monkeypatch):
    request = made(tokenizer=tokenizer, stop="bcd")
    commit(request, A, B)
    assert request.take() == ([A, B], "a")
    monkeypatch.setattr(Tokenizer, "decode", None)
    commit(request, C, D)
    with pytest.raises(TypeError):
        request.take()
    request.give_up_text("broken")
    assert request.take() == ([C, D], "") and request.take() == ([], "")
    result = request.result()
    assert (result.tokens, result.text) == ([A, B, C, D], "a")
    assert (result.finish_reason, result.error) == ("failed", "broken")
    assert columns(request) == {4}


def test_text_that_may_become_a_stop_string_is_held_back(tokenizer):
    request = made(tokenizer=tokenizer, stop="bcd")
    commit(request, A, B, C)
    assert request.take() == ([A, B, C], "a")
    commit(request, A)
    assert request.take() == ([A], "bca")


def test_a_text_ends_before_its_stop_string_and_its_tokens_behind_it(tokenizer):
    request = made(tokenizer=tokenizer, stop="bc")
    commit(request, A, B)
    assert request.take() == ([A, B], "a")
    commit(request, C, D)
    assert request.take() == ([C], "") and request.finish_reason == "stop"
    result = request.result()
    assert (result.tokens, result.text, result.finish_reason) == ([A, B, C], "a", "stop")
    assert columns(request) == {3}


def test_a_stop_string_before_the_end_token_comes_first(tokenizer):
    request = made(tokenizer=tokenizer, stop="ab", ends=(D,))
    commit(request, C, A, B, D)
    result = request.result()
    assert (result.tokens, result.text, result.finish_reason) == ([C, A, B], "c", "stop")


@pytest.mark.parametrize(("last", "tokens", "text"), [(D, [A, B, C, D, D], ""), (A, [A, B, C], "a")])
def test_tokens_that_may_yet_be_cut_are_not_brought(tokenizer, last, tokens, text):
    """The string "bc" is complete, but "abcdd", which begins before it, may come."""
    request = made(tokenizer=tokenizer, stop=["bc", "abcdd"])
    commit(request, A, B, C, D)
    assert request.take() == ([A, B, C], "") and request.unsettled
    commit(request, last)
    assert request.take() == (tokens[3:], text) and not request.unsettled
    result = request.result()
    assert (result.tokens, result.text, result.finish_reason) == (tokens, text, "stop")


def test_a_result_while_running_is_what_is_committed(tokenizer):
    request = made(tokenizer=tokenizer, stop="never")
    commit(request, A, B)
    result = request.result()
    assert (result.tokens, result.text, result.finish_reason) == ([A, B], "ab", "interrupted")
    assert (result.prompt_tokens, result.seed, result.stats.new_tokens) == ([30, 31], 3, 2)
    commit(request, C)
    assert result.tokens == [A, B] and request.result().tokens == [A, B, C]


@pytest.mark.parametrize(
    ("count", "reason", "left"), [(None, "cancelled", 3), (2, "stop", 2), (0, "stop", 0), (5, "stop", 3)]
)
def test_a_text_that_is_stopped_keeps_its_first_tokens(tokenizer, count, reason, left):
    request = made(tokenizer=tokenizer)
    commit(request, A, B, C)
    request.take()
    request.stop(count, reason)
    result = request.result()
    assert (result.tokens, result.text) == ([A, B, C][:left], "abc"[:left])
    assert result.finish_reason == reason and columns(request) == {left}


def test_a_text_that_is_done_keeps_its_reason_unless_it_is_cut():
    request = made(new=2)
    commit(request, A, B)
    request.stop(None, "cancelled")
    assert request.finish_reason == "length"
    request.stop(1, "stop")
    assert (request.finish_reason, request.new) == ("stop", [A])


@pytest.mark.parametrize(
    ("tokens", "kept", "reason"), [([A, B], [A, B], None), ([A, 50], [A, 50], "end"), ([A, B, C], [A, B, C], "length")]
)
@pytest.mark.parametrize("line", range(12, 23))
def test_an_interrupt_leaves_no_token_without_its_probability(interrupted_at, line, tokens, kept, reason):
    """Nor a text that goes on behind its end."""
    request = made(new=3, ends=(50,))
    if interrupted_at(Request.commit, line, lambda: commit(request, *tokens)):
        request.mend()
    else:
        assert request.new == kept
    assert columns(request) == {len(request.new)} and request.new in ([], kept)
    assert request.finish_reason == (reason if request.new else None)


def behind(request: Request, length: int = 4) -> tuple[list[int], list[int], list[float]]:
    request.block_length = length
    result = request.result()
    return result.cut_tokens, result.cut_step_map, result.cut_draw_logprobs


@pytest.mark.parametrize(("new", "ends", "count"), [(3, (), 3), (9, (B,), 2), (4, (), 4), (1, (A,), 1)])
def test_what_was_decided_behind_the_end_of_the_text_is_told_up_to_the_end_of_its_block(new, ends, count):
    request = made(prompt=range(30, 38), new=new, ends=ends)
    request.commit([A, B, C, D], [2, 1, 4, 3], [0.5] * 4, [-1.0, -2.0, -3.0, -4.0], ["denoised"] * 4)
    told = [A, B, C, D][count:], [2, 1, 4, 3][count:], [-1.0, -2.0, -3.0, -4.0][count:]
    assert request.new == [A, B, C, D][:count] and behind(request) == told
    assert request.result().draw_logprobs == [-1.0, -2.0, -3.0, -4.0][:count]


def test_a_later_cut_leaves_the_rest_of_its_own_block_behind_and_no_other():
    request = made(prompt=range(30, 38), new=7)
    commit(request, A, B, C, D)
    request.commit([C, D, A, B], [1, 2, 3, 4], [0.5] * 4, [-1.0, -2.0, -3.0, -4.0], ["denoised"] * 4)
    assert behind(request) == ([B], [4], [-4.0])
    request.stop(5, "stop")
    assert behind(request) == ([D, A, B], [2, 3, 4], [-2.0, -3.0, -4.0])
    request.stop(3, "stop")
    assert request.new == [A, B, C] and behind(request) == ([D], [1], [-0.5])
    request.stop(0, "stop")
    assert behind(request) == ([], [], [])


def test_nothing_is_behind_a_text_that_has_not_ended():
    request = made(prompt=range(30, 38))
    commit(request, A, B, C)
    assert behind(request) == ([], [], [])
    request.behind = [(D, 1, -1.0)]  # of a commit that an interrupt kept from its end
    assert behind(request) == ([], [], [])
    request.mend()
    request.stop(None, "cancelled")
    assert behind(request) == ([], [], [])
