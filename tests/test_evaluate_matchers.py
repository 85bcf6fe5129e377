"""Matchers of simsd evaluate: which texts they take for right."""

from __future__ import annotations

import pytest

import simsd
from simsd.evaluate import matchers


@pytest.mark.parametrize(
    ("name", "text", "answer", "right"),
    [
        ("exact", " Paris\n", "Paris", True),
        ("exact", "paris", "Paris", False),
        ("exact", "Paris.", "Paris", False),
        ("contains", "The capital of France is Paris.", "paris", True),
        ("contains", "It lies in new\n  York", "New York", True),
        ("contains", "She has 15 apples", "5", False),
        ("contains", "C++ is one", "C++", True),
        ("contains", "Comparison", "Paris", False),
        ("contains", "", "Paris", False),
        ("contains", "La República", "república", True),
        ("number", "23+45=68. ANSWER: 68", "68", True),
        ("number", "68 apples, not 69", "68", False),
        ("number", "It costs $1,250.00.", "1250", True),
        ("number", "so x = -3", "-3", True),
        ("number", "12-5=7", "7", True),
        ("number", "7-3", "3", True),
        ("number", "about .5 of it", "0.50", True),
        ("number", "[3,1,2]", "2", True),
        ("number", "none", "0", False),
        ("number", "In 2024 it was 5%.", "5", True),
        ("choice", "The dog is a mammal. ANSWER: B", "B", True),
        ("choice", "The answer is (c).", "C", True),
        ("choice", "Answer: A. No, the answer is **D**.", "d", True),
        ("choice", "B", "B", True),
        ("choice", "(B) Paris", "B", True),
        ("choice", "B. Paris", "B", True),
        ("choice", "A dog is a mammal", "A", False),
        ("choice", "I think so", "I", False),
        ("choice", "", "A", False),
    ],
)
def test_plain_matchers(name, text, answer, right):
    assert matchers.matcher(name)(text, answer) is right


@pytest.mark.parametrize(
    ("pattern", "text", "right"),
    [
        (r"ANSWER: (\d+)", "ANSWER: 1\nANSWER: 12", True),
        (r"\d+", "1 and 12", True),
        (r"^#### (.*)$", "work\n#### 12 \nmore", True),
        (r"(?:a|b)=(\d+)", "a=12 c=13", True),
        (r"ANSWER: (\d+)?", "ANSWER: ", False),
        (r"ANSWER: (\d+)", "12", False),
    ],
)
def test_the_last_match_of_a_pattern_counts(pattern, text, right):
    assert matchers.matcher("regex", pattern)(text, "12") is right


@pytest.mark.parametrize(
    ("name", "pattern", "message"),
    [
        ("fuzzy", None, "exact, contains, number, choice, regex; got 'fuzzy'"),
        ("regex", None, "got --match regex with no --pattern"),
        ("exact", "x", "got --match exact with --pattern 'x'"),
        ("regex", "(", "no regular expression"),
        ("regex", "(a)(b)", "2 groups"),
    ],
)
def test_matchers_that_there_are_not_are_refused(name, pattern, message):
    with pytest.raises(simsd.SimsdError) as refused:
        matchers.matcher(name, pattern)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "answer"), [("contains", " "), ("number", "seven"), ("choice", "12"), ("exact", "")], ids=str
)
def test_an_answer_that_no_text_can_give_is_noticed(name, answer):
    assert matchers.obstacle(name, answer)


@pytest.mark.parametrize(("name", "answer"), [("number", "1,200"), ("choice", "b"), ("contains", "x"), ("regex", "y")])
def test_an_answer_that_a_text_can_give_is_taken(name, answer):
    assert matchers.obstacle(name, answer) is None
