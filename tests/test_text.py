"""Text of tokens that come bit by bit: whole characters, and nothing from the first stop string on."""

from __future__ import annotations

import functools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import small_tokenizers
from simsd.text import REPLACEMENT, AnswerText, GrowingText, first_stop

KINDS = list(small_tokenizers.ALL)
quick = settings(max_examples=120, deadline=None)


@functools.cache
def tokenizer_of(kind: str):
    return small_tokenizers.ALL[kind]()


def chunks_of(tokens: list[int], sizes: list[int]) -> list[list[int]]:
    """The tokens in runs of these sizes, the last one open-ended."""
    chunks = []
    for size in sizes:
        chunks.append(tokens[:size])
        tokens = tokens[size:]
    return [*chunks, tokens]


def ids(kind: str):
    return st.lists(st.integers(0, max(tokenizer_of(kind).ids)), max_size=40)


@st.composite
def answers(draw):
    """A kind of tokenizer, random ids, and how they come."""
    kind = draw(st.sampled_from(KINDS))
    return kind, draw(ids(kind)), draw(st.lists(st.integers(0, 5), max_size=20))


@quick
@given(answers())
# A valid character whose run of fallback bytes becomes invalid afterwards: all of it is rewritten.
@example(("sentence_piece", [0xE6 + 3, 0xBC + 3, 0xA2 + 3, 0xFF + 3, 260], [1, 1, 1, 1]))
# The same with a special token, which has no text, within the run.
@example(("sentence_piece", [0xE6 + 3, 0xBC + 3, 0xA2 + 3, 2, 0xFF + 3], [3, 1, 1]))
# Spaces at the beginning, of which one is dropped, one by one.
@example(("sentence_piece", [259, 259, 2, 260, 262], [1, 1, 1, 1, 1]))
@example(("byte_level", [162, 257, 163, 100], [1, 1, 1]))
def test_the_pieces_are_together_the_text_of_all_tokens(answer):
    kind, tokens, sizes = answer
    tokenizer = tokenizer_of(kind)
    text = GrowingText(tokenizer)
    pieces = [text.push(chunk) for chunk in chunks_of(tokens, sizes)]
    whole = tokenizer.decode(tokens)
    assert whole.startswith("".join(pieces))
    assert "".join(pieces) + text.rest() == text.text == whole


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
def test_no_character_is_ever_cut(kind):
    tokenizer = tokenizer_of(kind)
    written = "naïve ✓ 漢字 🙂 end" * 3
    tokens = tokenizer.backend.encode(written, add_special_tokens=False)
    assert len(tokens) > len(written)  # some characters are several tokens
    text = GrowingText(tokenizer)
    pieces = [text.push([token]) for token in tokens]
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) + text.rest() == written


def test_a_character_that_is_never_finished_comes_at_the_end():
    tokenizer = tokenizer_of("byte_level")
    text = GrowingText(tokenizer)
    assert text.push(tokenizer.backend.encode("ok 🙂")[:-1]) == "ok " and text.rest() == REPLACEMENT


@pytest.mark.parametrize("kind", KINDS)
def test_a_push_decodes_the_last_tokens_alone(kind):
    tokenizer, longest = tokenizer_of(kind), 0

    class Counting:
        backend = tokenizer.backend

        def decode(self, tokens):
            nonlocal longest
            longest = max(longest, len(tokens))
            return tokenizer.decode(tokens)

    text = GrowingText(Counting())
    token = tokenizer.backend.convert_tokens_to_ids({"sentence_piece": "▁the", "byte_level": "a"}.get(kind, "the"))
    for _ in range(300):
        text.push([token] * 4)
    assert longest <= 12


@pytest.mark.parametrize(
    ("text", "stop", "start", "expected"),
    [
        ("abcabc", ["c", "b"], 0, ((1, 2), 6)),  # by place, not by the order of the list
        ("abcabc", ["bc", "b"], 0, ((1, 2), 6)),  # the shortest of those that begin there
        ("abcabc", ["b"], 2, ((4, 5), 6)),
        ("abcab", ["abcabd"], 0, (None, 0)),
        ("abcab", ["abd"], 0, (None, 3)),
        ("abc", ["abcd", "bc"], 0, ((1, 3), 0)),
        ("abc", [], 0, (None, 3)),
        ("", ["a"], 0, (None, 0)),
    ],
)
def test_the_first_stop_string_and_where_one_may_yet_begin(text, stop, start, expected):
    assert first_stop(text, stop, start) == expected


def cut_text(whole: str, stop: list[str]) -> str:
    """What a text is with stop strings: what stands before the first place where one of them begins."""
    places = [whole.find(string) for string in stop if string in whole]
    return whole[: min(places)] if places else whole


stop_strings = st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3)


@quick
@given(st.text("ab ", max_size=30), stop_strings, st.lists(st.integers(0, 5), max_size=20))
@example("xabcabx", ["abcd", "bc"], [4])  # "bc" is complete while "abcd" may still come: it does not
@example("xabcdx", ["abcd", "bc"], [4])  # here it does
def test_a_text_ends_before_its_first_stop_string_however_it_comes(written, stop, sizes):
    tokenizer = tokenizer_of("byte_level")
    tokens = tokenizer.backend.encode(written)
    answer = AnswerText(tokenizer, stop)
    expected, taken, settled = cut_text(written, stop), "", 0
    chunks = chunks_of(tokens, sizes)
    for i, chunk in enumerate(chunks):
        answer.push(chunk, last=i == len(chunks) - 1)
        taken += answer.take()
        assert expected.startswith(taken)  # nothing is taken back
        assert settled <= answer.settled
        settled = answer.settled
    assert taken == answer.text == expected
    assert answer.ended == (expected != written)
    # One token is one character here: those before the stop string, and its own up to the one that completes it.
    if answer.ended:
        completing = min(len(string) for string in stop if written.startswith(string, len(expected)))
        assert len(answer.tokens) == settled == len(expected) + completing
    else:
        assert answer.tokens == tokens


def test_what_cannot_become_a_stop_string_is_not_held_back():
    tokenizer = tokenizer_of("byte_level")
    answer = AnswerText(tokenizer, ["\nQuestion:"])
    taken = []
    for piece in ("The end.", "\nQue", "stion", "able\n", "\n", "Question", ":"):
        answer.push(tokenizer.backend.encode(piece))
        taken.append(answer.take())
    assert taken == ["The end.", "", "", "\nQuestionable", "\n", "", ""]
    assert answer.ended and answer.text == "The end.\nQuestionable\n"


def test_a_stop_string_may_be_part_of_one_token_or_of_a_character_s_last():
    tokenizer = tokenizer_of("sentence_piece")
    vocabulary = tokenizer.backend.get_vocab()
    within = AnswerText(tokenizer, ["h"])
    within.push([vocabulary["▁a"], vocabulary["▁the"], vocabulary["b"]])
    assert within.text == "a t" and within.tokens == [vocabulary["▁a"], vocabulary["▁the"]]
    bytes_ = [vocabulary[f"<0x{byte:02X}>"] for byte in "✓".encode()]
    last = AnswerText(tokenizer, ["✓"])
    last.push([vocabulary["b"], *bytes_])
    assert not last.ended  # a further byte would make the run invalid
    last.push([vocabulary["b"]])
    assert last.ended and last.text == "b" and last.tokens == [vocabulary["b"], *bytes_]
