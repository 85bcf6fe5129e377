"""simsd train-order: one command from a model and prompts to a head that loads."""

from __future__ import annotations

import json
import shlex

import pytest

import byte_pair
import simsd
from simsd.order.head import load_order_head
from small_checkpoints import write_checkpoint, write_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ("--steps", 20, "--max-new-tokens", 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return byte_pair.write_model(tmp_path_factory.mktemp("model") / "bytes", block_length=8)


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = {"prompt": "hello"}, {"prompt": "good bye"}, "so", {"prompt": "hello"}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_a_model_never_seen_trains_its_head_by_one_command(run, model, prompts, tmp_path):
    output = tmp_path / "order.safetensors"
    code, out, err = run("train-order", model, prompts, "-o", output, *SHORT)
    assert code == 0, err
    first, *_, last = out.splitlines()
    # Of whole blocks, 20 tokens at least behind 5, 8 and 2 of the prompts.
    assert first.startswith(f"recorded {27 + 24 + 22} states of 10 blocks from 3 prompts in ")
    for said in ("order head", "log-odds alone", "%"):
        assert said in out
    assert "recording done, 3 prompts" in err and "training done, 20 steps" in err
    assert shlex.split(last) == ["simsd", "generate", "--target", str(model), "--order-head", str(output)]
    assert load_order_head(output, simsd.load(model)).block_length == 8
    assert [file.name for file in tmp_path.iterdir() if "unfinished" in file.name] == []


def test_checkpoints_of_sdar_and_chats_are_taken(run, tmp_path):
    folder = tmp_path / "small"
    write_checkpoint(folder, moe=True, extra={"block_length": 4})
    write_tokenizer(folder)
    prompts = tmp_path / "chats.jsonl"
    chats = [{"messages": [{"role": "user", "content": letter}]} for letter in "abc"]
    prompts.write_text("\n".join(json.dumps(chat) for chat in chats))
    code, out, err = run("train-order", folder, prompts, "-o", tmp_path / "x.safetensors", *SHORT)
    assert code == 0, err
    assert "3 prompts" in out


def test_the_block_length_is_that_of_the_option(run, model, prompts, tmp_path):
    output = tmp_path / "order.safetensors"
    code, out, _ = run("train-order", model, prompts, "-o", output, "--block-length", 4, *SHORT)
    assert code == 0 and "--block-length 4" in out.splitlines()[-1]
    assert load_order_head(output, simsd.load(model), block_length=4).block_length == 4
    with pytest.raises(simsd.SimsdError, match="blocks of 4 tokens"):
        load_order_head(output, simsd.load(model))


def test_the_same_command_gives_the_same_file(run, model, prompts, tmp_path):
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for output in files:
        assert run("train-order", model, prompts, "-o", output, "--temperature", 0.7, *SHORT)[0] == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_interrupt_keeps_what_is_done(run, model, prompts, tmp_path, monkeypatch):
    output = tmp_path / "order.safetensors"

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("simsd.order.run.train", interrupt)
        code, _, err = run("train-order", model, prompts, "-o", output, *SHORT)
    assert code == 130 and not output.exists()
    assert err.endswith(f"interrupted: the same command goes on from {output}.unfinished\n")
    with monkeypatch.context() as patched:
        patched.setattr("simsd.order.run.record_traces", interrupt)
        code, _, err = run("train-order", model, prompts, "-o", output, *SHORT)
    assert code == 0 and output.exists(), err


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ("holds no prompts",)),
        ('{"prompt": "hello"}\n', ("two or more, got 1",)),
        ('{"prompt": "hello"}\n' * 3, ("two or more, got 1",)),
        ("{not json\n", ("prompt 1 is not JSON",)),
        ('{"prompt": 3}\n', ("prompt 1", "expected a string")),
    ],
    ids=["empty", "one prompt", "one prompt thrice", "no JSON", "no text"],
)
def test_bad_prompt_files_are_refused(run, assert_one_line_error, model, tmp_path, text, parts):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    outcome = run("train-order", model, file, "-o", tmp_path / "order.safetensors", *SHORT)
    assert_one_line_error(outcome, *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--steps", 0), ("steps", ">= 1", "0")),
        (("--max-new-tokens", 0), ("max_new_tokens must be at least 1",)),
        (("--max-new-tokens", 1000), ("max_new_tokens 1000", "512 positions")),
        (("--block-length", 65), ("block_length", "64", "65")),
        (("--block-length", 1), ("blocks of 1 token",)),
        (("--batch", 0), ("max_batch", ">= 1", "0")),
        (("--temperature", -1), ("temperature", "-1")),
    ],
)
def test_bad_options_are_refused(run, assert_one_line_error, model, prompts, tmp_path, options, parts):
    outcome = run("train-order", model, prompts, "-o", tmp_path / "order.safetensors", *options)
    assert_one_line_error(outcome, *parts)


def test_nothing_is_overwritten_and_missing_files_are_named(run, assert_one_line_error, model, prompts, tmp_path):
    there = tmp_path / "order.safetensors"
    there.write_text("work")
    assert_one_line_error(run("train-order", model, prompts, "-o", there), "is there already")
    nowhere = tmp_path / "none" / "order.safetensors"
    assert_one_line_error(run("train-order", model, prompts, "-o", nowhere), "cannot be written")
    missing = tmp_path / "none.jsonl"
    assert_one_line_error(run("train-order", model, missing, "-o", tmp_path / "x.safetensors"), str(missing))
    assert_one_line_error(run("train-order", tmp_path / "none", prompts, "-o", tmp_path / "x.safetensors"), "none")
