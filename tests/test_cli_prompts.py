"""simsd generate over files of prompts, with system turns, stop strings and several texts."""

from __future__ import annotations

import json

import pytest

import simsd
from simsd.cli.prompts import Request, read_requests
from simsd.engine.runner import Runner

pytestmark = pytest.mark.usefixtures("one_thread")


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": "a", "prompt": "hello"}\n\n"two"\n{"id": 3, "prompt": "na\u00efve \u2028"}\n', "utf-8")
    return file


def test_a_file_of_prompts_gives_a_line_each_in_order(run, pair, prompts, tmp_path):
    settings = ("--max-new-tokens", 8, *pair)
    code, out, err = run("generate", "--prompts", prompts, "--output", tmp_path / "out.jsonl", *settings)
    assert (code, out) == (0, ""), err
    assert "3 texts in " in err and "24 tokens in " in err and err.count("\n") == 1
    rows = lines_of((tmp_path / "out.jsonl").read_text("utf-8"))
    assert [(row["index"], row.get("id"), row["prompt"]) for row in rows] == [
        (0, "a", "hello"),
        (1, None, "two"),
        (2, 3, "naïve \u2028"),
    ]
    for row in rows:
        assert {"text", "tokens", "finish_reason", "stats", "seed"} <= set(row)
        _, alone, _ = run("generate", row["prompt"], "--json", *settings)
        assert {name: json.loads(alone)[name] for name in ("text", "tokens", "seed")} == {
            name: row[name] for name in ("text", "tokens", "seed")
        }
    _, out, _ = run("generate", "--prompts", prompts, *settings)
    assert [row["text"] for row in lines_of(out)] == [row["text"] for row in rows]


def test_chats_and_a_system_turn_are_sent_through_the_template(run, tmp_path):
    file = tmp_path / "chats.jsonl"
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of Japan?"}]
    file.write_text(json.dumps({"messages": chat}) + "\n")
    settings = ("--max-new-tokens", 4, "--draft", "none")
    _, out, err = run("generate", "--prompts", file, *settings)
    (row,) = lines_of(out)
    assert row["messages"] == chat, err
    _, alone, _ = run("generate", chat[1]["content"], "--system", "Be brief.", "--json", *settings)
    encoded = simsd.load("tiny-target").encode_prompt(chat)
    assert json.loads(alone)["prompt_tokens"] == encoded and json.loads(alone)["tokens"] == row["tokens"]
    code, _, err = run("generate", "--prompts", file, "--system", "Be brief.", *settings)
    assert code == 2 and "system turn of its own" in err


def test_stop_strings_end_the_text_wherever_it_is_shown(run, pair, prompts):
    settings = ("--max-new-tokens", 24, "--temperature", 0.8, *pair)
    _, out, _ = run("generate", "hello", "--json", *settings)
    text = json.loads(out)["text"]
    stop = text[9:11]
    expected = text[: text.index(stop)]
    _, out, _ = run("generate", "hello", "--stop", "never there", "--stop", stop, "--json", *settings)
    assert (json.loads(out)["text"], json.loads(out)["finish_reason"]) == (expected, "stop")
    for option in ((), ("--stream",)):
        assert run("generate", "hello", "--stop", stop, *option, *settings)[1] == expected + "\n"
    _, out, _ = run("generate", "--prompts", prompts, "--stop", stop, *settings)
    assert lines_of(out)[0]["text"] == expected


def test_several_texts_have_seeds_that_give_them_again(run, pair, prompts):
    settings = ("--max-new-tokens", 8, "--temperature", 1, *pair)
    _, out, err = run("generate", "hello", "-n", 3, "--seed", 5, "--json", *settings)
    rows = lines_of(out)
    assert len({row["seed"] for row in rows}) == 3 and rows[0]["seed"] == 5, err
    _, again, _ = run("generate", "hello", "--seed", rows[2]["seed"], "--json", *settings)
    assert json.loads(again)["tokens"] == rows[2]["tokens"]
    _, shown, err = run("generate", "hello", "-n", 3, "--seed", 5, *settings)
    titles = [f"--- {i} of 3, seed {row['seed']}\n{row['text']}\n" for i, row in enumerate(rows, start=1)]
    assert shown == "".join(titles) and err.count(" tokens (") == 3
    _, out, _ = run("generate", "--prompts", prompts, "-n", 2, "--batch", 3, "--seed", 5, *settings)
    together = lines_of(out)
    assert [(row["index"], row["sample"]) for row in together] == [(p, s) for p in range(3) for s in range(2)]
    assert [row["text"] for row in together[:2]] == [row["text"] for row in rows[:2]]


def test_an_interrupt_keeps_what_is_finished(run, pair, tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\nthree\n")
    settings = ("--prompts", file, "--max-new-tokens", 4, "--batch", 1, "--verify", "none", *pair)
    _, whole, _ = run("generate", *settings)
    step, calls = Runner.run, []

    def interrupted_later(*arguments):
        calls.append(1)
        if len(calls) == 10:  # a text of four tokens takes four or five steps
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr("simsd.cli.generate._warm_up", lambda *_: None)
    monkeypatch.setattr(Runner, "run", interrupted_later)
    code, _, err = run("generate", *settings, "--output", tmp_path / "out.jsonl")
    kept = lines_of((tmp_path / "out.jsonl").read_text())
    assert code == 130 and f"interrupted: {len(kept)} of 3 texts in " in err and 1 <= len(kept) < 3
    assert [row["tokens"] for row in kept] == [row["tokens"] for row in lines_of(whole)][: len(kept)]


def test_finished_texts_that_wait_for_an_earlier_one_are_kept_too(run, pair, prompts, monkeypatch):
    from simsd.engine.decoder import Decoder

    def third_first(decoder):
        updates = [update for update in everything(decoder) if update.result is not None]
        yield from (update for update in updates if update.index == 2)
        raise KeyboardInterrupt

    everything = Decoder.__iter__
    monkeypatch.setattr("simsd.cli.generate._warm_up", lambda *_: None)
    monkeypatch.setattr(Decoder, "__iter__", third_first)
    code, out, _ = run("generate", "--prompts", prompts, "--max-new-tokens", 4, *pair)
    assert code == 130 and [row["index"] for row in lines_of(out)] == [2]


def test_an_output_that_holds_something_is_not_overwritten(run, pair, prompts, tmp_path, assert_one_line_error):
    file = tmp_path / "out.jsonl"
    file.write_text("precious\n")
    outcome = run("generate", "--prompts", prompts, "--output", file, *pair)
    assert_one_line_error(outcome, str(file), "there already")
    assert file.read_text() == "precious\n"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("hello", "--output", "x.jsonl"), ("--output", "--prompts")),
        (("hello", "-n", 2, "--stream"), ("--stream", "-n")),
        (("hello", "-n", 0), ("n must be", "0")),
        (("hello", "--batch", 0), ("max_batch", "0")),
        (("hello", "--stop", ""), ("stop", "empty")),
        (("hello", "--stop", "caf\udce9"), ("--stop", "UTF-8")),
        (("hello", "--system", "Be brief."), ("--system", "chat template")),
        (("--prompts", "/no/such/file"), ("/no/such/file",)),
    ],
    ids=lambda value: " ".join(map(str, value)) if value and len(value) > 1 and "-" in str(value) else "",
)
def test_bad_requests_are_one_line_errors(run, pair, assert_one_line_error, arguments, parts):
    assert_one_line_error(run("generate", *arguments, *pair), *parts)


def test_a_prompt_beside_a_file_is_refused(run, pair, prompts, assert_one_line_error):
    assert_one_line_error(run("generate", "hello", "--prompts", prompts, *pair), "--prompts replaces the prompt")
    assert_one_line_error(run("generate", "--prompts", prompts, "--show-steps", *pair), "--show-steps", "--prompts")


def test_lines_of_files_are_what_users_mean(tmp_path):
    plain, marked = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_bytes("\ufeffone\r\n\r\n{two}\u2028\n".encode())
    assert read_requests(plain) == [Request("one"), Request("{two}\u2028")]
    marked.write_bytes('\ufeff"a\u0085b"\r\n'.encode())
    assert read_requests(marked) == [Request("a\u0085b")]
