"""simsd bench: its tables and files, its errors."""

from __future__ import annotations

import itertools
import json

import pytest

from simsd import benchmarking
from simsd.benchmarking import MODES
from simsd.cli import bench

pytestmark = pytest.mark.usefixtures("one_thread")


def test_bench_prints_tables_of_80_columns_and_writes_both_files(run, pair, tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    files = ("--json", tmp_path / "b.json", "--markdown", tmp_path / "b.md")
    chosen = ("--items", 2, "--families", "facts,choice", "--batch", "1,2", "--max-new-tokens", 4)
    code, out, err = run("bench", *chosen, *files, *pair)
    assert code == 0, err
    assert "…" not in out and max(map(len, out.splitlines())) <= 80
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


def test_bench_of_the_pair_for_long_answers_is_on_questionnaires(run, tmp_path):
    arguments = ("--items", 1, "--modes", "exact-self", "--json", tmp_path / "b.json")
    code, out, err = run("bench", "--target", "long-target", *arguments)
    assert code == 0, err
    figures = json.loads((tmp_path / "b.json").read_text())
    assert (figures["target"], figures["draft"]) == ("long-target", "long-draft")
    assert figures["settings"]["block_length"] == 16
    native = figures["pooled"]["modes"]["native"]
    assert native["tokens"] > 4 * 40 and native["accuracy"] >= 0.9
    assert figures["pooled"]["modes"]["exact-self"]["same_text"] == 1.0


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
def test_bad_bench_option_is_a_one_line_error(run, pair, arguments, parts, assert_one_line_error):
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
