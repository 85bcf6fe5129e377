# ruff: noqa: F811 (fixtures are imported by name)
"""Streamers of `model.generate`: what they receive, and that they end."""

from __future__ import annotations

import asyncio
import threading

import pytest
from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer, TextStreamer
from transformers.generation import BaseStreamer

from hf_runs import PROMPT, StopAt, draft, greedy, run, tokenizer  # noqa: F401
from simsd import SimsdError

pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("settings", [{}, {"stopping_criteria": [StopAt(len(PROMPT) + 6)]}], ids=["length", "stopped"])
def test_a_streamer_receives_exactly_the_output(run, settings):
    streamer = Recorder()
    output = run(streamer=streamer, **settings)
    assert streamer.ended and streamer.parts[0] == PROMPT
    assert [token for part in streamer.parts for token in part] == output[0].tolist()


def test_a_text_streamer_prints_the_text(run, greedy, tokenizer, capsys):
    run(streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == tokenizer.decode(greedy)


def test_a_streamer_takes_one_row(run):
    with pytest.raises(SimsdError, match="streamer takes one row, got 2"):
        run([PROMPT, PROMPT], streamer=Recorder())


def broken(input_ids, scores, **kwargs):
    raise LookupError("the criterion's own")


def interrupted(input_ids, scores, **kwargs):
    raise KeyboardInterrupt


ERRORS = {
    "refused_by_us": ({"repetition_penalty": 1.2}, SimsdError),
    "refused_by_transformers": ({"not_a_setting": 3}, ValueError),
    "while_decoding": ({"stopping_criteria": [broken]}, LookupError),
    "interrupted": ({"stopping_criteria": [interrupted]}, KeyboardInterrupt),
}


def in_a_thread(call, errors: list):
    def work():
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_ends_the_reader_in_the_other_thread_at_once(run, greedy, tokenizer, error):
    settings, kind = ERRORS[error]
    streamer, errors = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30), []
    thread = in_a_thread(lambda: run(streamer=streamer, **settings), errors)
    text = "".join(streamer)
    thread.join(30)
    assert [type(error) for error in errors] == [kind]
    # What was committed before is there.
    assert text == (tokenizer.decode(greedy[:1]) if "stopping_criteria" in settings else "")


def test_an_error_ends_an_asynchronous_reader(run, tokenizer):
    async def read():
        streamer, errors = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30), []
        thread = in_a_thread(lambda: run(streamer=streamer, stopping_criteria=[broken]), errors)
        texts = [text async for text in streamer]
        await asyncio.to_thread(thread.join, 30)
        return texts, errors

    texts, errors = asyncio.run(read())
    assert texts and type(errors[0]) is LookupError


def test_a_reader_receives_the_whole_text_and_its_end(run, greedy, tokenizer):
    streamer, errors = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30), []
    thread = in_a_thread(lambda: run(streamer=streamer), errors)
    assert "".join(streamer) == tokenizer.decode(greedy)
    thread.join(30)
    assert not errors


def test_a_streamer_that_fails_is_told_as_it_is(run):
    class Broken(Recorder):
        def put(self, value):
            raise LookupError("the streamer's own")

        def end(self):
            raise RuntimeError("nothing to end")

    with pytest.raises(LookupError, match="the streamer's own"):
        run(streamer=Broken())


def test_a_streamer_is_ended_once(run):
    class Counting(Recorder):
        ends = 0

        def end(self):
            self.ends += 1

    for settings in ({}, {"stopping_criteria": [broken]}):
        streamer = Counting()
        try:
            run(streamer=streamer, **settings)
        except LookupError:
            pass
        assert streamer.ends == 1
