"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

import pytest

import simsd
from simsd.serve.logprobs import chat_logprobs, completion_logprobs


@pytest.fixture(scope="module")
def tokenizer():
    return simsd.load("tiny-target").tokenizer


def test_a_chat_s_entries_have_candidates_best_first(tokenizer):
    capital, of = tokenizer.backend.encode(" capital of")
    shown = chat_logprobs(tokenizer, [capital, of], [-0.5, -1.0], [[(capital, -0.5), (of, -2.0)], []])
    first, second = shown["content"]
    assert (first["token"], first["logprob"], bytes(first["bytes"])) == (" capital", -0.5, b" capital")
    assert [(other["token"], other["logprob"]) for other in first["top_logprobs"]] == [
        (" capital", -0.5),
        (" of", -2.0),
    ]
    assert (second["token"], second["top_logprobs"]) == (" of", [])


def test_a_part_of_a_character_has_no_bytes_and_a_special_token_has_its_name(tokenizer):
    part = tokenizer.backend.encode("\N{SNOWMAN}")[0]
    shown = chat_logprobs(tokenizer, [part, tokenizer.backend.eos_token_id], [-1.0, -2.0], [[], []])["content"]
    assert shown[0]["bytes"] is None
    assert (shown[1]["token"], bytes(shown[1]["bytes"])) == ("<|end|>", b"<|end|>")


def test_completions_have_columns_and_places_in_the_text(tokenizer):
    capital, of = tokenizer.backend.encode(" capital of")
    shown = completion_logprobs(tokenizer, [capital, of], [None, -1.0], [[], [(of, -1.0), (capital, -3.0)]], 7)
    assert shown == {
        "tokens": [" capital", " of"],
        "token_logprobs": [None, -1.0],
        "top_logprobs": [None, {" of": -1.0, " capital": -3.0}],
        "text_offset": [7, 15],
    }
