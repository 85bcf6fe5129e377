"""What becomes of single rows: by a worker, in this process."""

from __future__ import annotations

import pytest

import simsd
from simsd import GenerationConfig, SimsdError
from simsd.seeds import row_seed

pytest.importorskip("ray")
pa = pytest.importorskip("pyarrow")

from simsd.ray.rows import plain_rows, table_of  # noqa: E402
from simsd.ray.worker import COLUMNS, Work, Worker  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def work(**settings) -> Work:
    return Work("tiny-target", None, GenerationConfig(**settings), "cpu", {"dtype": "auto"}, 1)


@pytest.fixture(scope="module")
def worker(one_thread) -> Worker:
    return Worker(work(max_new_tokens=12, temperature=0.8, seed=5))


def by_id(table) -> dict:
    return {row["id"]: row for row in table.to_pylist()}


def test_a_bad_prompt_fails_its_own_row_and_tells_why(worker):
    rows = {
        "good": "What is 3 + 4?",
        "long": "What is 3 + 4? " * 2000,
        "none": None,
        "number": 7,
        "no such token": [5, 10**9],
        "no content": [{"role": "user"}],
        "no text": "\ud800",
    }
    table = worker(table_of([{"key": key, "prompt": prompt} for key, prompt in rows.items()], "key", "prompt"))
    assert table.column_names == ["id", *COLUMNS]
    found = by_id(table)
    (expected,) = simsd.generate(
        "tiny-target", rows["good"], max_new_tokens=12, temperature=0.8, seed=row_seed(5, "good")
    )
    good = found.pop("good")
    assert (good["tokens"], good["text"], good["error"]) == (expected.tokens, expected.text, None)
    assert good["prompt_tokens"] == len(expected.prompt_tokens)
    assert good["target_forwards"] > 0
    words = {
        "none": "got null",
        "number": "got 7",
        "long": "max_new_tokens",
        "no such token": "1000000000",
        "no content": "content",
    }
    for key, row in found.items():
        assert (row["finish_reason"], row["tokens"], row["text"]) == ("failed", None, None)
        assert words.get(key, "") in row["error"] and "\n" not in row["error"]


def test_chats_of_a_dataset_and_lists_of_ids_are_what_they_are_in_python(worker):
    chats = [
        [{"role": "user", "content": "What is 3 + 4?"}],
        [{"role": "user", "content": "hi", "name": "Ann"}, {"role": "user", "content": "What is 3 + 4?"}],
    ]
    from_arrow = plain_rows(pa.table({"n": [1, 2], "chat": chats}), "n", "chat")
    from_list = table_of([{"n": 1, "chat": chats[0]}, {"n": 2, "chat": chats[1]}], "n", "chat")
    assert worker(from_arrow)["tokens"] == worker(from_list)["tokens"]
    assert worker(from_arrow)["error"].null_count == 2
    ids = simsd.load("tiny-target").encode_prompt("What is 3 + 4?")
    rows = by_id(worker(plain_rows(pa.table({"n": [1], "ids": [ids]}), "n", "ids")))
    (expected,) = simsd.generate("tiny-target", ids, max_new_tokens=12, temperature=0.8, seed=row_seed(5, 1))
    assert rows[1]["tokens"] == expected.tokens


def test_rows_do_not_depend_on_what_they_share_a_block_with(worker):
    rows = table_of([f"What is {n} + 4?" for n in range(20)], None, "prompt")
    whole, pieces = worker(rows), [worker(rows.slice(start, 3)) for start in range(0, 20, 3)]
    told = ["id", "text", "tokens", "finish_reason", "error", "seed", "prompt_tokens"]  # forwards depend on timing
    assert whole.select(told) == pa.concat_tables(pieces).select(told)


def test_an_iteration_that_raises_does_not_end_the_block(worker, monkeypatch):
    engine, step, calls = worker.engine, worker.engine.step, []

    def failing():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("a hiccup of the device")
        return step()

    rows = table_of(["What is 3 + 4?", "What is 5 + 4?"], None, "prompt")
    expected = worker(rows)
    monkeypatch.setattr(engine, "step", failing)
    assert worker(rows)["tokens"] == expected["tokens"] and len(calls) > 2


def test_what_no_row_could_do_without_is_an_error_of_the_first_block():
    worker = Worker(work(drafter="model"))
    with pytest.raises(SimsdError, match="drafter='model' needs a draft model"):
        worker(table_of(["hello"], None, "prompt"))


@pytest.mark.parametrize(
    "table, words",
    [
        ({"id": [1.5], "prompt": ["a"]}, "ids must be integers or strings, got double"),
        ({"id": [1, None], "prompt": ["a", "b"]}, "1 rows have no id"),
        ({"id": [1], "prompt": [b"a"]}, "row 1: a prompt must be a string, a chat or token ids, got bytes"),
    ],
    ids=["floats", "no id", "bytes"],
)
def test_a_block_without_proper_ids_or_prompts_is_refused(table, words):
    with pytest.raises(SimsdError, match=words):
        plain_rows(pa.table(table), "id", "prompt")
