"""Errors of the command line: one line each, that says what to do."""

from __future__ import annotations

import pytest

import byte_pair

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--strategy", "best"), ("strategy", "sequential", "entropy_bounded", "'best'")),
        (("--accept", "always"), ("accept", "match, mrs", "'always'")),
        (("--verify", "exactly"), ("verify", "exact, temporal, none", "'exactly'")),
        (("--drafter", "other"), ("drafter", "auto, model, self", "'other'")),
        (("--drafter", "model", "--draft", "none"), ("drafter='model'", "needs a draft model")),
        (("--lookahead", "0"), ("lookahead", "1..16", "0")),
        (("--lookahead", "two"), ("--lookahead", "simsd generate --help")),
        (("--max-rows", "-1"), ("max_rows", "-1")),
        (("--accept", "mrs"), ("accept='mrs'", "verify='temporal'")),
        (("--rejected-tail", "draft_argmax"), ("rejected_tail='draft_argmax'", "verify='temporal'")),
        (("--rejected-tail", "keep"), ("rejected_tail", "truncate", "'keep'")),
        (("--steps", "9"), ("steps", "block length 4", "9")),
        (("--sub-block-length", "9"), ("sub_block_length", "block length 4", "9")),
        (("--sub-block-length", "2", "--steps", "1"), ("steps", "at least 2", "sub-blocks", "1")),
        (("--draft-steps", "5"), ("draft_steps", "block length 4", "5")),
        (("--block-length", "65"), ("block_length", "64", "65")),
        (("--steps", "3", "--block-length", "2"), ("steps", "2", "3")),
        (("--max-new-tokens", "1000"), ("max_new_tokens 1000", "512 positions")),
        (("--max-new-tokens", "-1"), ("max_new_tokens", "-1")),
        (("--temperature", "-1"), ("temperature", "-1")),
        (("--temperature", "warm"), ("--temperature", "simsd generate --help")),
        (("--top-p", "0"), ("top_p", "0")),
        (("--dtype", "int8"), ("dtype", "bfloat16", "'int8'")),
        (("--device", "toaster"), ("device", "toaster")),
        (("--bogus",), ("--bogus", "simsd generate --help")),
        (("--json", "--stream"), ("--json", "--stream")),
        (("--draft", ""), ("--draft", "tiny-draft", "long-draft")),
        (("--draft", "/no/such/folder"), ("/no/such/folder",)),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_bad_option_is_a_one_line_error(run, pair, arguments, parts, assert_one_line_error):
    assert_one_line_error(run("generate", "hello", *pair, *arguments), *parts)


def test_mask_token_in_the_prompt_is_refused(run, pair, assert_one_line_error):
    assert_one_line_error(run("generate", "a <|MASK|> b", *pair), "mask token", "<|MASK|>")


def test_missing_prompt_is_refused(run, pair, assert_one_line_error):
    assert_one_line_error(run("generate", *pair), "no prompt", "simsd generate")


def test_empty_stdin_without_a_prompt_is_refused(run, pair, assert_one_line_error):
    assert_one_line_error(run("generate", *pair, stdin=""), "no prompt", "standard input is empty")


def test_prompt_over_the_position_limit_is_refused(run, pair, assert_one_line_error):
    assert_one_line_error(run("generate", "x" * 600, *pair), "600 prompt tokens", "512 positions", "shorten")


def test_prompt_with_broken_bytes_is_refused(run, pair, assert_one_line_error):
    assert_one_line_error(run("generate", "caf\udce9", *pair), "not valid UTF-8")


@pytest.mark.parametrize("name", ["tiny-tagret", "./nowhere", "/nowhere/at/all"])
def test_unknown_target_is_refused(run, name, assert_one_line_error):
    assert_one_line_error(run("generate", "hello", "--target", name), name, "tiny-target", "long-target")


def test_folder_without_a_checkpoint_is_refused(run, tmp_path, assert_one_line_error):
    assert_one_line_error(run("generate", "hello", "--target", tmp_path), str(tmp_path), "config.json")


def test_truncated_weights_are_refused(run, tmp_path, assert_one_line_error):
    folder = byte_pair.write_model(tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_one_line_error(run("generate", "hello", "--target", folder), "model.safetensors", "truncated")


def test_corrupt_tokenizer_is_refused(run, tmp_path, assert_one_line_error):
    folder = byte_pair.write_model(tmp_path / "corrupt")
    (folder / "tokenizer.json").write_text("{")
    assert_one_line_error(run("generate", "hello", "--target", folder), "tokenizer")


def test_model_without_a_tokenizer_is_refused(run, tmp_path, assert_one_line_error):
    folder = byte_pair.write_model(tmp_path / "bare", tokenizer=False)
    assert_one_line_error(run("generate", "hello", "--target", folder), "no tokenizer")


def test_pair_of_different_vocabularies_is_refused(run, pair, tmp_path, assert_one_line_error):
    other = byte_pair.write_model(tmp_path / "other", tokenizer=False, vocab_size=300)
    outcome = run("generate", "hello", *pair[:2], "--draft", other)
    assert_one_line_error(outcome, "vocab size", "300", "258")


def test_pair_of_different_block_lengths_is_refused(run, pair, tmp_path, assert_one_line_error):
    other = byte_pair.write_model(tmp_path / "other", block_length=8)
    assert_one_line_error(run("generate", "hello", *pair[:2], "--draft", other), "block length 4", "8")


def test_unknown_command_is_refused(run, assert_one_line_error):
    assert_one_line_error(run("generat"), "generat", "simsd --help")


def test_debug_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("SIMSD_DEBUG", "1")
    code, _, err = run("generate", "hello", "--strategy", "best")
    assert code == 2 and "Traceback" in err and "'best'" in err
