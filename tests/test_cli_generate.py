"""simsd generate: what it prints where, its exit codes."""

from __future__ import annotations

import json
import re
import time

import pytest
from safetensors.torch import load_file, save_file

import byte_pair
from simsd.engine.runner import Runner

pytestmark = pytest.mark.usefixtures("one_thread")


def test_plain_output_is_the_text_alone_and_statistics_go_to_stderr(run, pair):
    code, out, err = run("generate", "hello", "--max-new-tokens", 8, *pair)
    _, as_json, _ = run("generate", "hello", "--max-new-tokens", 8, "--json", *pair)
    assert code == 0
    assert out == json.loads(as_json)["text"] + "\n"
    assert "8 tokens (length)" in err and "target forwards" in err and err.count("\n") == 1


def test_json_is_one_object_with_prompt_result_and_stats(run, pair):
    code, out, err = run("generate", "hello", "--max-new-tokens", 8, "--json", *pair)
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert answer["prompt"] == "hello" and answer["finish_reason"] == "length"
    for column in ("tokens", "step_map", "probs", "origins"):
        assert len(answer[column]) == 8
    stats = answer["stats"]
    assert stats["target_forwards"] == stats["target_verify_forwards"] + stats["target_denoise_forwards"] > 0


@pytest.mark.parametrize("arguments", [(), ("-",)], ids=["no prompt argument", "dash"])
def test_prompt_comes_from_stdin(run, pair, arguments):
    settings = ("--json", "--max-new-tokens", 4, *pair)
    _, from_argument, _ = run("generate", "hello\nworld", *settings)
    code, from_stdin, _ = run("generate", *arguments, *settings, stdin="hello\nworld\n")
    assert code == 0
    assert json.loads(from_stdin)["prompt"] == "hello\nworld"
    assert json.loads(from_stdin)["tokens"] == json.loads(from_argument)["tokens"]


def test_empty_prompt_generates_from_nothing(run, pair):
    code, out, _ = run("generate", "", "--max-new-tokens", 4, "--json", *pair)
    assert code == 0 and len(json.loads(out)["tokens"]) == 4


@pytest.mark.parametrize("prompt", ["hello", "naïve ✓"])
def test_stream_prints_the_same_text(run, pair, prompt):
    plain = run("generate", prompt, "--max-new-tokens", 24, *pair)
    streamed = run("generate", prompt, "--max-new-tokens", 24, "--stream", *pair)
    assert streamed[0] == 0 and streamed[1] == plain[1]


def test_show_steps_shows_every_token_and_a_legend_that_counts(run, pair):
    code, out, err = run("generate", "hello", "--max-new-tokens", 8, "--show-steps", "--verify", "none", *pair)
    assert code == 0 and "8 tokens (length)" in err and "tokens (" not in out
    assert "text  " in out and "how   " in out and "step  " in out and "│" in out
    assert "denoised by the target: 8" in out


def test_verify_none_needs_no_draft(run, pair):
    arguments = ("generate", "hello", "--max-new-tokens", 4, "--json", "--verify", "none", *pair[:2], "--draft", "/no")
    code, out, _ = run(*arguments)
    assert code == 0 and set(json.loads(out)["origins"]) == {"denoised"}


@pytest.mark.parametrize("prompt", ["hello", "one two three"])
def test_text_is_that_of_native_decoding_whatever_the_draft_options(run, pair, prompt):
    def tokens(*options):
        code, out, err = run("generate", prompt, "--max-new-tokens", 12, "--json", "--temperature", 0.8, *options)
        assert code == 0, err
        return json.loads(out)["tokens"]

    native = tokens("--verify", "none", *pair)
    for options in (
        (),
        ("--verify", "exact"),
        ("--drafter", "model", "--lookahead", 3),
        ("--drafter", "self"),
        ("--drafter", "model", "--max-rows", 8, "--draft-steps", 2),
    ):
        assert tokens(*options, *pair) == native, options
    assert tokens(*pair[:2]) == native


@pytest.mark.parametrize(
    ("options", "instead"),
    [(("--max-rows", 64), "it drafts for itself"), (("--verify", "temporal"), "native decoding")],
    ids=["exact", "temporal"],
)
def test_own_target_without_draft_says_what_becomes_of_it(run, pair, options, instead):
    code, out, err = run("generate", "hello", "--max-new-tokens", 8, "--json", *options, *pair[:2])
    assert code == 0 and err == f"no --draft for {pair[1]}: {instead}\n"
    answer = json.loads(out)
    assert answer["stats"]["draft_forwards"] == 0
    assert ("drafted" in answer["origins"]) == (instead == "it drafts for itself")


@pytest.mark.parametrize(
    "options", [("--drafter", "self"), ("--verify", "none"), ("--draft", "none")], ids=lambda options: " ".join(options)
)
def test_a_draft_that_is_not_wanted_is_not_missed(run, pair, options):
    code, _, err = run("generate", "hello", "--max-new-tokens", 4, "--json", *options, *pair[:2])
    assert (code, err) == (0, "")


def test_self_drafting_does_not_load_the_draft(run, pair):
    arguments = ("generate", "hello", "--max-new-tokens", 4, "--json", "--drafter", "self", *pair[:2])
    code, _, err = run(*arguments, "--draft", "/no/such/folder")
    assert (code, err) == (0, "")


def test_statistics_name_drafts_and_bonus(run, pair):
    settings = ("generate", "hello", "--max-new-tokens", 16, *pair)
    _, _, err = run(*settings, "--drafter", "model", "--draft", pair[1])  # it agrees with itself
    assert re.fullmatch(
        r"16 tokens \(length\), \d+ target forwards? \(\d+\.\d tokens each\), \d+ of the draft, "
        r"\d+/\d+ drafted accepted \(\d+%\), \d+ tok/s\n",
        err,
    )
    _, _, err = run(*settings, "--verify", "temporal")
    assert re.search(r", \d+ bonus, \d+ tok/s\n", err)


@pytest.mark.parametrize("mode", ["plain", "--stream", "--json"])
@pytest.mark.parametrize("verify", ["exact", "temporal"])
def test_interrupt_prints_what_is_committed(run, pair, monkeypatch, verify, mode):
    step, calls = Runner.run, []

    def interrupted_later(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(*arguments)

    settings = ("--max-new-tokens", 40, "--verify", verify, "--max-rows", 0, *pair)
    _, whole, _ = run("generate", "hello", "--json", *settings)
    monkeypatch.setattr("simsd.cli.generate._warm_up", lambda *_: None)
    monkeypatch.setattr(Runner, "run", interrupted_later)
    code, out, err = run("generate", "hello", *settings, *([] if mode == "plain" else [mode]))
    assert code == 130 and "Traceback" not in err
    if mode == "--json":
        answer = json.loads(out)
        assert answer["finish_reason"] == "interrupted"
        assert 2 <= len(answer["tokens"]) < 40
        assert answer["tokens"] == json.loads(whole)["tokens"][: len(answer["tokens"])]
    else:
        assert "(interrupted)" in err
        assert len(out) > 1 and json.loads(whole)["text"].startswith(out.rstrip("\n").rstrip("\ufffd"))


def test_what_the_first_forward_costs_is_not_in_the_speed(run, pair, monkeypatch):
    step, calls = Runner.run, []

    def slow_at_first(*arguments):
        calls.append(1)
        if len(calls) == 1:
            time.sleep(5)
        return step(*arguments)

    monkeypatch.setattr(Runner, "run", slow_at_first)
    code, out, _ = run("generate", "hello", "--max-new-tokens", 4, "--json", *pair)
    assert code == 0 and json.loads(out)["stats"]["total_seconds"] < 5


def test_a_model_that_fails_is_an_error(run, tmp_path):
    broken = byte_pair.write_model(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"].fill_(3e38)  # finite, but no sum of it is
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run("generate", "hello", "--target", broken, "--draft", "none")
    assert code == 2 and "(failed)" in err and "not finite" in err and "--dtype float32" in err
