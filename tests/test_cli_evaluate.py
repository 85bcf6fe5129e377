"""simsd evaluate: a file of questions to tables, JSON and pictures, and its errors."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

import simsd
from simsd import benchmarking
from simsd.evaluate.positions import Span, spans
from stand_ins import random_sdar

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = Path(__file__).parents[1] / "examples" / "evaluation"


@pytest.fixture
def write(tmp_path):
    """write(lines) -> a file of them; what is no string becomes JSON."""

    def write_(*lines: object, name: str = "own.jsonl") -> Path:
        file = tmp_path / name
        file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n", encoding="utf-8")
        return file

    return write_


def some(file: str, count: int) -> list[str]:
    return (EXAMPLES / file).read_text(encoding="utf-8").splitlines()[:count]


def test_the_built_in_pair_answers_right_natively_and_exactly(run, write, tmp_path):
    file = write(*some("arithmetic.jsonl", 4))
    options = ("--match", "number", "--json", tmp_path / "e.json", "--plot", tmp_path / "pictures")
    code, out, err = run("evaluate", file, *options)
    assert (code, err) == (0, "evaluate: questions done, 4 of 4 items\n"), err
    assert "accuracy 100.0% against 100.0%" in " ".join(out.split()) and "same text in 100.0%" in " ".join(out.split())
    figures = json.loads((tmp_path / "e.json").read_text())
    assert list(figures["pooled"]["modes"]) == ["native", "exact-auto"]
    native, exact = figures["pooled"]["modes"].values()
    assert native["accuracy"] == exact["accuracy"] == exact["same_text"] == 1.0
    assert exact["target_forwards_per_token"] < native["target_forwards_per_token"]
    for line, (question, given) in enumerate(zip(figures["questions"], some("arithmetic.jsonl", 4), strict=True), 1):
        given = json.loads(given)
        assert (question["line"], question["question"], question["answers"]) == (
            line,
            given["question"],
            [given["answer"]],
        )
        texts = {mode["text"] for mode in question["modes"].values()}
        assert len(texts) == 1 and texts.pop().endswith(f"ANSWER: {given['answer']}")
        assert all(mode["right"] and mode["finish_reason"] == "end" for mode in question["modes"].values())
    for found in figures["positions"].values():
        assert sum(span["tokens"] for span in found) == native["tokens"]
    for name in ("speed_quality.png", "tokens_per_forward.png"):
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")


def test_keys_groups_and_answers_are_the_users(run, write, tmp_path):
    lines = [
        {"q": "What is the capital of France?", "a": ["Lutetia", "Paris"], "kind": "capitals"},
        "",
        {"q": [{"role": "user", "content": "What is the atomic number of carbon?"}], "a": 6, "kind": "elements"},
        {"q": "What is the capital of Spain?", "a": "Lisbon", "kind": "capitals"},
    ]
    keys = ("--question-key", "q", "--answer-key", "a", "--group-key", "kind")
    code, out, err = run("evaluate", write(*lines), *keys, "--modes", "exact-auto", "--json", tmp_path / "e.json")
    assert code == 0, err
    assert "Capitals (2 items)" in out and "Elements (1 items)" in out and "All items (3 items)" in out
    figures = json.loads((tmp_path / "e.json").read_text())
    assert {group["name"]: group["modes"]["native"]["accuracy"] for group in figures["families"]} == {
        "capitals": 0.5,
        "elements": 1.0,
    }
    right = {question["line"]: question["modes"]["native"]["right"] for question in figures["questions"]}
    assert right == {1: True, 3: True, 4: False}


def test_the_same_question_twice_is_two_questions(run, pair, write, tmp_path):
    question = {"question": "x", "answer": "y"}
    arguments = ("--max-new-tokens", 4, "--json", tmp_path / "e.json")
    code, out, err = run("evaluate", write(question, question), *arguments, *pair)
    assert code == 0, err
    assert [question["line"] for question in json.loads((tmp_path / "e.json").read_text())["questions"]] == [1, 2]
    assert "2 of 2 native texts were cut at --max-new-tokens 4" in " ".join(out.split())


def test_all_modes_and_a_batch(run, pair, write, tmp_path):
    file = write(*({"question": f"question {n}", "answer": "a"} for n in range(3)))
    chosen = ("--modes", "temporal,exact-model,exact-self", "--batch", "2", "--max-new-tokens", 8)
    code, out, err = run("evaluate", file, *chosen, "--json", tmp_path / "e.json", *pair)
    assert code == 0, err
    figures = json.loads((tmp_path / "e.json").read_text())
    assert list(figures["pooled"]["batches"]["2"]) == ["native", "temporal", "exact-model", "exact-self"]
    assert list(figures["positions"]) == ["native", "exact-model", "exact-self"] and "batch 2" in out


def test_an_interrupt_shows_what_was_measured(run, pair, write, tmp_path, monkeypatch):
    compare = benchmarking.compare

    def interrupted(*arguments):
        yield from itertools.islice(compare(*arguments), 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmarking, "compare", interrupted)
    file = write(*({"question": f"question {n}", "answer": "a"} for n in range(3)))
    code, out, _ = run("evaluate", file, "--max-new-tokens", 4, "--json", tmp_path / "e.json", *pair)
    assert code == 130 and "interrupted after 1 of 3 questions" in out
    figures = json.loads((tmp_path / "e.json").read_text())
    assert figures["interrupted"] and len(figures["questions"]) == 1


GOOD = {"question": "x", "answer": "1"}


@pytest.mark.parametrize(
    ("lines", "options", "parts"),
    [
        ([], (), ("holds no questions",)),
        ([GOOD, "", "{"], (), ("line 3: not JSON",)),
        ([GOOD, "[]"], (), ("line 2", '{"question": ..., "answer": ...}', "[]")),
        ([{"prompt": "x", "answer": "y"}], (), ("line 1", "'question'", "prompt, answer", "--question-key")),
        ([{"question": "x"}], (), ("line 1", "'answer'", "--answer-key")),
        ([GOOD], ("--group-key", "kind"), ("line 1", "'kind'", "--group-key")),
        ([{"question": 5, "answer": "y"}], (), ("line 1", "'question' must be a string or a list of turns", "5")),
        ([{"question": "x", "answer": None}], (), ("line 1", "'answer' must be", "null")),
        ([{"question": "x", "answer": []}], (), ("line 1", "'answer' must be", "[]")),
        ([{"question": "x", "answer": True}], (), ("line 1", "'answer' must be", "true")),
        ([{"question": "x", "answer": " "}], (), ("line 1", "empty")),
        ([GOOD, {"question": "x", "answer": "six"}], ("--match", "number"), ("line 2", "'six'", "--match number")),
        ([GOOD], ("--match", "choice"), ("line 1", "'1'", "--match choice")),
        ([GOOD], ("--match", "fuzzy"), ("--match", "exact, contains", "'fuzzy'")),
        ([GOOD], ("--match", "regex"), ("no --pattern",)),
        ([GOOD], ("--match", "regex", "--pattern", "("), ("no regular expression",)),
        ([GOOD], ("--modes", "exact"), ("exact-model", "got exact")),
        ([GOOD], ("--draft", "none", "--modes", "temporal"), ("temporal", "--draft")),
        ([GOOD], ("--batch", "x"), ("--batch", "'x'")),
        ([GOOD], ("--max-new-tokens", "0"), ("max_new_tokens", "0")),
        ([GOOD], ("--json", "/no/such/folder/e.json"), ("/no/such/folder/e.json",)),
        ([GOOD], ("--plot", "/no/such/folder/pictures"), ("--plot", "/no/such/folder/pictures")),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) and value[0].startswith("--") else "",
)
def test_a_mistake_is_a_one_line_error(run, pair, write, lines, options, parts, assert_one_line_error):
    assert_one_line_error(run("evaluate", write(*lines), *pair, *options), *parts)


def test_a_file_that_is_not_there_is_a_one_line_error(run, assert_one_line_error):
    assert_one_line_error(run("evaluate", "/no/such/file.jsonl"), "/no/such/file.jsonl")


@pytest.mark.parametrize(
    ("question", "part"),
    [([{"role": "user", "content": "x"}], "no chat template"), ("a <|MASK|> b", "mask token")],
    ids=["chat", "mask token"],
)
def test_a_question_that_the_model_cannot_take_is_named(run, pair, write, assert_one_line_error, question, part):
    lines = (GOOD, {"question": question, "answer": "y"})
    assert_one_line_error(run("evaluate", write(*lines), *pair), "own.jsonl, line 2: ", part)


# Tokens per forward along the text


@pytest.mark.parametrize(
    "settings", [{"verify": "none"}, {"verify": "exact"}, {"drafter": "self", "lookahead": 3}], ids=str
)
def test_spans_count_the_forwards_that_there_were(settings):
    """Whole blocks and no end: nothing was decided behind the texts."""
    model = random_sdar(0)
    prompts = [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10]]
    results = [
        simsd.generate(model, prompt, model, settings, max_new_tokens=40 - len(prompt), end_token_ids=())[0]
        for prompt in prompts
    ]
    found = spans(results, 4)
    assert [span.first for span in found] == [0, 8, 16, 24, 32]
    assert sum(span.tokens for span in found) == 70
    assert sum(span.forwards for span in found) == sum(result.stats.target_forwards for result in results)
    if settings == {"verify": "none"}:
        assert all(span.tokens_per_forward == 1.0 for span in found)


def test_a_span_without_a_forward_of_its_own_has_no_ratio():
    assert Span(8, 4, 0).tokens_per_forward is None
