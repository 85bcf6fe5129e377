"""The command line: what it prints where, its exit codes, its one-line errors."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import byte_pair
from simsd import benchmarking, exact, temporal
from simsd.benchmarking import MODES
from simsd.cli import bench, main
from terminal import Terminal


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pair")
    target = byte_pair.write_model(folder / "target")
    draft = byte_pair.write_model(folder / "draft", hidden_size=16)
    return ["--target", str(target), "--draft", str(draft)]


@pytest.fixture
def run(capsys, monkeypatch):
    """run(*arguments, stdin=...) -> (exit code, stdout, stderr); standard input is a terminal unless given."""

    def run_(*arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
        stream = io.StringIO(stdin or "")
        stream.isatty = lambda: stdin is None
        monkeypatch.setattr(sys, "stdin", stream)
        capsys.readouterr()  # what the test's own preparations printed
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run_


def assert_one_line_error(outcome, *parts: str) -> None:
    code, out, err = outcome
    assert (code, out) == (2, ""), err
    assert err.startswith("simsd: error: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err


# generate


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
    assert (code, err) == (0, "")
    assert "text  " in out and "how   " in out and "step  " in out
    assert "denoised by the target: 8" in out and "8 tokens (length)" in out


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
    loop = {"exact": exact.Exact, "temporal": temporal.Temporal}[verify]
    step, calls = loop.step, []

    def interrupted_later(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(*arguments)

    settings = ("--max-new-tokens", 40, "--verify", verify, "--max-rows", 0, *pair)
    _, whole, _ = run("generate", "hello", "--json", *settings)
    monkeypatch.setattr(loop, "step", interrupted_later)
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


def test_a_model_that_fails_is_an_error(run, tmp_path):
    broken = byte_pair.write_model(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"].fill_(3e38)  # finite, but no sum of it is
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run("generate", "hello", "--target", broken, "--draft", "none")
    assert code == 2 and "(failed)" in err and "not finite" in err and "--dtype float32" in err


# generate --stream on a terminal


@pytest.fixture
def run_in(run, monkeypatch):
    """run_in(terminal, *arguments): `run` with standard output on the terminal -> (exit code, stderr)."""

    def run_in_(terminal: Terminal, *arguments) -> tuple[int, str]:
        monkeypatch.setenv("COLUMNS", str(terminal.width))
        monkeypatch.setenv("LINES", str(terminal.height))
        monkeypatch.delenv("TERM", raising=False)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", terminal)
            code, out, err = run(*arguments)
        assert out == ""
        return code, err

    return run_in_


def test_stream_on_a_terminal_ends_as_the_plain_text(run, run_in, pair):
    arguments = ("generate", "hello", "--max-new-tokens", 40, *pair)
    _, out, _ = run(*arguments)
    terminal, plain = Terminal(30, 10), Terminal(30, 10)
    plain.write(out)
    assert run_in(terminal, *arguments, "--stream")[0] == 0
    assert terminal.text() == plain.text() and terminal.text(dim=True).strip() == ""


@pytest.mark.parametrize("verify", ["exact", "none"])
def test_the_block_on_its_way_is_dim_and_committed_text_is_not(run, run_in, pair, verify):
    class Watched(Terminal):
        def flush(self):
            shown.append((self.text(dim=False), self.text(dim=True).strip()))

    shown: list[tuple[str, str]] = []
    arguments = ("generate", "hello", "--max-new-tokens", 10, "--verify", verify, "--max-rows", 0, *pair)
    _, out, _ = run(*arguments)
    terminal = Watched(200, 10)
    run_in(terminal, *arguments, "--stream")
    ahead = [dim for _, dim in shown]
    assert any("·" in dim for dim in ahead) and ahead[-1] == ""
    committed = [plain for plain, _ in shown]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(committed))
    assert committed[-1] == terminal.text() and len(set(committed)) > 2


def test_an_interrupt_leaves_no_provisional_text(run_in, pair, monkeypatch):
    step, calls = exact.Exact.step, []

    def interrupted_later(*arguments):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(exact.Exact, "step", interrupted_later)
    terminal = Terminal(80, 10)
    code, _ = run_in(terminal, "generate", "hello", "--verify", "none", "--stream", "--max-new-tokens", 20, *pair)
    assert code == 130 and terminal.text(dim=True).strip() == "" and terminal.text() != ""


def test_a_dumb_terminal_gets_committed_text_alone(run, pair, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    arguments = ("generate", "hello", "--max-new-tokens", 8, *pair)
    _, out, _ = run(*arguments)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", terminal)
        run(*arguments, "--stream")
    assert terminal.getvalue() == out


# Errors


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
        (("--draft", ""), ("--draft", "tiny-draft")),
        (("--draft", "/no/such/folder"), ("/no/such/folder",)),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_bad_option_is_a_one_line_error(run, pair, arguments, parts):
    assert_one_line_error(run("generate", "hello", *pair, *arguments), *parts)


def test_mask_token_in_the_prompt_is_refused(run, pair):
    assert_one_line_error(run("generate", "a <|MASK|> b", *pair), "mask token", "<|MASK|>")


def test_missing_prompt_is_refused(run, pair):
    assert_one_line_error(run("generate", *pair), "no prompt", "simsd generate")


def test_empty_stdin_without_a_prompt_is_refused(run, pair):
    assert_one_line_error(run("generate", *pair, stdin=""), "no prompt", "standard input is empty")


def test_prompt_over_the_position_limit_is_refused(run, pair):
    assert_one_line_error(run("generate", "x" * 600, *pair), "600 prompt tokens", "512 positions", "shorten")


def test_prompt_with_broken_bytes_is_refused(run, pair):
    assert_one_line_error(run("generate", "caf\udce9", *pair), "not valid UTF-8")


@pytest.mark.parametrize("name", ["tiny-tagret", "./nowhere", "/nowhere/at/all"])
def test_unknown_target_is_refused(run, name):
    assert_one_line_error(run("generate", "hello", "--target", name), name, "tiny-target")


def test_folder_without_a_checkpoint_is_refused(run, tmp_path):
    assert_one_line_error(run("generate", "hello", "--target", tmp_path), str(tmp_path), "config.json")


def test_truncated_weights_are_refused(run, tmp_path):
    folder = byte_pair.write_model(tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_one_line_error(run("generate", "hello", "--target", folder), "model.safetensors", "truncated")


def test_corrupt_tokenizer_is_refused(run, tmp_path):
    folder = byte_pair.write_model(tmp_path / "corrupt")
    (folder / "tokenizer.json").write_text("{")
    assert_one_line_error(run("generate", "hello", "--target", folder), "tokenizer")


def test_model_without_a_tokenizer_is_refused(run, tmp_path):
    folder = byte_pair.write_model(tmp_path / "bare", tokenizer=False)
    assert_one_line_error(run("generate", "hello", "--target", folder), "no tokenizer")


def test_pair_of_different_vocabularies_is_refused(run, pair, tmp_path):
    other = byte_pair.write_model(tmp_path / "other", vocab_size=300)
    outcome = run("generate", "hello", *pair[:2], "--draft", other)
    assert_one_line_error(outcome, "vocab size", "300", "258")


def test_pair_of_different_block_lengths_is_refused(run, pair, tmp_path):
    other = byte_pair.write_model(tmp_path / "other", block_length=8)
    assert_one_line_error(run("generate", "hello", *pair[:2], "--draft", other), "block length 4", "8")


def test_unknown_command_is_refused(run):
    assert_one_line_error(run("generat"), "generat", "simsd --help")


def test_debug_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("SIMSD_DEBUG", "1")
    code, _, err = run("generate", "hello", "--strategy", "best")
    assert code == 2 and "Traceback" in err and "'best'" in err


# bench


def test_bench_prints_tables_of_100_columns_and_writes_both_files(run, pair, tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    files = ("--json", tmp_path / "b.json", "--markdown", tmp_path / "b.md")
    chosen = ("--items", 2, "--families", "facts,choice", "--batch", "1,2", "--max-new-tokens", 4)
    code, out, err = run("bench", *chosen, *files, *pair)
    assert code == 0, err
    assert "…" not in out and max(map(len, out.splitlines())) <= 100
    for word in ("Facts (2 items)", "Choice", "All items (4", "Mean of families", "bound", "batch 2", "torch"):
        assert word in out
    for mode in MODES:
        assert sum(line.split()[:1] == [mode] for line in out.splitlines()) >= 5  # 4 groups and the throughput
    assert err.splitlines() == ["bench: facts done, 2 of 4 items", "bench: choice done, 4 of 4 items"]
    figures = json.loads((tmp_path / "b.json").read_text())
    assert [group["name"] for group in figures["families"]] == ["facts", "choice"]
    assert figures["pooled"]["items"] == 4 and figures["machine"]["cpu"] and not figures["interrupted"]
    assert figures["settings"]["strategy"] and figures["settings"]["batches"] == [1, 2]
    assert list(figures["settings"]["modes"]) == list(figures["pooled"]["modes"]) == list(MODES)
    for mode in ("exact-model", "exact-self", "exact-auto"):
        assert figures["pooled"]["modes"][mode]["same_text"] == 1.0
        assert figures["pooled"]["batches"]["2"][mode]["same_text"] == 1.0
    assert "| mode | facts | choice | mean of families |" in (tmp_path / "b.md").read_text()


def test_bench_of_chosen_modes_has_native_too(run, pair, tmp_path):
    arguments = ("--items", 1, "--families", "facts", "--max-new-tokens", 4, "--json", tmp_path / "b.json")
    code, out, err = run("bench", "--modes", "exact-self, temporal", *arguments, *pair)
    assert code == 0, err
    figures = json.loads((tmp_path / "b.json").read_text())
    assert list(figures["pooled"]["modes"]) == ["native", "exact-self", "temporal"] and "exact-auto" not in out


def test_bench_without_a_draft_compares_what_needs_none(run, pair, tmp_path):
    arguments = ("--items", 1, "--families", "facts", "--max-new-tokens", 4, "--json", tmp_path / "b.json")
    code, out, err = run("bench", *arguments, *pair[:2])
    figures = json.loads((tmp_path / "b.json").read_text())
    assert code == 0, err
    assert list(figures["pooled"]["modes"]) == ["native", "exact-self", "exact-auto"]
    assert figures["draft"] is None and "no draft" in out


def test_bench_takes_settings_of_the_temporal_and_the_exact_verifier(run, pair, tmp_path):
    settings = ("--rejected-tail", "draft_argmax", "--end-gate", 0.5, "--lookahead", 1, "--max-rows", 8)
    arguments = ("--items", 1, "--families", "facts", "--max-new-tokens", 4, "--json", tmp_path / "b.json")
    code, _, err = run("bench", *arguments, *settings, *pair)
    used = json.loads((tmp_path / "b.json").read_text())["settings"]
    assert code == 0, err
    assert (used["rejected_tail"], used["end_gate"], used["lookahead"], used["max_rows"]) == ("draft_argmax", 0.5, 1, 8)


def test_bench_of_own_prompts_has_no_accuracy(run, pair, tmp_path):
    prompts = tmp_path / "own.jsonl"
    prompts.write_text('"one"\n{"prompt": "two"}\n')
    arguments = ("--modes", "exact-auto", "--max-new-tokens", 4, "--json", tmp_path / "b.json")
    code, _, err = run("bench", "--prompts", prompts, *arguments, *pair)
    figures = json.loads((tmp_path / "b.json").read_text())
    assert code == 0, err
    assert figures["families"][0]["items"] == 2 and figures["families"][0]["modes"]["native"]["accuracy"] is None


@pytest.mark.parametrize("after, items", [(1, 1), (2, 2), (3, 2)], ids=["a prompt", "all prompts", "a batch round"])
def test_bench_interrupted_shows_what_was_measured(run, pair, tmp_path, monkeypatch, after, items):
    compare = benchmarking.compare

    def interrupted(*arguments):
        yield from itertools.islice(compare(*arguments), after)
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmarking, "compare", interrupted)
    arguments = ("--items", 2, "--families", "facts", "--modes", "exact-self", "--batch", "2", "--max-new-tokens", 4)
    code, out, _ = run("bench", *arguments, "--json", tmp_path / "b.json", *pair)
    assert code == 130 and f"interrupted after {items} of 2 items" in out
    assert ("batch 2" in out) == (after == 3)
    figures = json.loads((tmp_path / "b.json").read_text())
    assert figures["interrupted"] and figures["pooled"]["items"] == items


def test_bench_interrupted_before_anything_was_measured_shows_nothing(run, pair, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(benchmarking, "compare", interrupted)
    code, out, _ = run("bench", "--items", 1, *pair)
    assert (code, out) == (130, "")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--families", "facts,maths"), ("arithmetic, code, facts, choice", "maths")),
        (("--families", "facts,facts"), ("once", "facts, facts")),
        (("--items", "0"), ("items", "0")),
        (("--modes", "native,exact"), ("exact-model", "got exact")),
        (("--modes", "temporal,temporal"), ("once", "temporal, temporal")),
        (("--modes", ""), ("modes", "none")),
        (("--draft", "none", "--modes", "temporal"), ("temporal", "--draft")),
        (("--batch", "1,x"), ("--batch", "1,8", "'1,x'")),
        (("--batch", "0"), ("--batch", "'0'")),
        (("--prompts", "/no/such/file"), ("/no/such/file",)),
        (("--json", "/no/such/folder/b.json"), ("/no/such/folder/b.json",)),
        (("--max-new-tokens", "0"), ("max_new_tokens", "0")),
        (("--strategy", "best"), ("strategy", "sequential")),
        (("--steps", "9"), ("steps", "9")),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_bad_bench_option_is_a_one_line_error(run, pair, arguments, parts):
    assert_one_line_error(run("bench", *pair, *arguments), *parts)


@pytest.mark.parametrize(
    ("content", "part"),
    [("\n\n", "no prompts"), ('{"text": 1}', "prompt 1"), ("{", "prompt 1 is not JSON")],
    ids=["empty", "wrong key", "not JSON"],
)
def test_bad_prompt_file_is_refused(tmp_path, content, part):
    file = tmp_path / "own.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=part):
        bench.read_prompts(file)


# info


def test_info_shows_ops_versions_and_models(run):
    code, out, err = run("info")
    assert (code, err) == (0, "")
    for word in ("masked_attention", "transformers", "batch invariance", "thin_linear", "tiny-target", "tiny-draft"):
        assert word in out


def test_info_as_json(run):
    code, out, _ = run("info", "--json")
    report = json.loads(out)
    assert code == 0 and set(report) == {"kernels", "versions", "batch_invariance", "models"}
    assert [model["name"] for model in report["models"]] == ["tiny-target", "tiny-draft"]


def test_info_tries_torchs_linear_layer(monkeypatch):
    from simsd.cli.info import batch_invariance

    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight: linear(x, weight) + (len(x) in (3, 5)))
    assert "3, 5" in batch_invariance()["torch linear, cpu float32"]
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight: x)
    assert batch_invariance()["torch linear, cpu float32"] == "yes at 1 to 16 rows (tried now)"
    monkeypatch.setattr(torch.nn.functional, "linear", None)
    assert "unknown (TypeError" in batch_invariance()["torch linear, cpu float32"]


def test_info_survives_broken_models(run, monkeypatch, tmp_path):
    (tmp_path / "tiny-target").mkdir()
    (tmp_path / "tiny-target" / "config.json").write_text("{")
    monkeypatch.setattr("simsd.cli.info.PAIR", tmp_path)
    code, out, _ = run("info")
    assert code == 0 and out.count("missing or damaged") == 2


# The command


def test_help_does_not_import_torch():
    code = "import sys; sys.argv[0] = 'simsd'; from simsd.cli import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | _path())
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout and "bench" in done.stdout


def test_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "simsd", "generate", "hello", "--strategy", "best"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | _path(),
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and "strategy must be one of" in done.stderr


def _path() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(sys.path)}
