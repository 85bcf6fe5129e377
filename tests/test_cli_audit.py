"""`simsd audit`: its tables, files and exit codes."""

from __future__ import annotations

import json

import pytest

import byte_pair
from simsd.audit import leak
from simsd.audit.report import RESULTS
from simsd.cli import main
from test_audit import flawed_walk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pair")
    target = byte_pair.write_model(folder / "target", sharpness=0.5)
    return ["--target", str(target), "--draft", str(target)]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("hello there\nwhat is this?\n")
    return str(file)


@pytest.fixture
def run(capsys):
    def run_(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["audit", *map(str, arguments)])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run_


def test_command_passes_and_writes_table_json_markdown_and_picture(run, pair, prompts, tmp_path):
    files = {name: tmp_path / f"audit.{name}" for name in ("json", "md", "svg")}
    code, out, err = run(
        *("--quick", "--prompts", prompts, "--seeds", 200, "--batch", 2, *pair, "--json", files["json"]),
        *("--markdown", files["md"], "--plot", files["svg"]),
    )
    assert code == 0, out + err
    assert "no required check failed" in out and "audit: equality done" in err
    written = json.loads(files["json"].read_text(), parse_constant=pytest.fail)
    assert written["passed"] is True and written["complete"] is True and written["prompts"] == 2
    assert set(written["counts"]) == set(RESULTS) and written["counts"]["FAIL"] == 0
    assert sum(written["counts"].values()) == len(written["checks"])
    for check in written["checks"]:
        assert set(check) == {"part", "name", "verify", "result", "summary", "figures", "details"}
        assert check["name"] in files["md"].read_text()
    assert 0 < written["alpha"] < 1e-3 and written["settings"]["seeds"] == 200
    assert files["svg"].read_text().startswith("<?xml")


def test_command_fails_with_exit_code_1_and_shows_the_first_difference(run, pair, prompts, monkeypatch, tmp_path):
    flawed_walk(monkeypatch, position=1)
    code, out, _ = run(
        *("--verify", "exact", "--strategies", "sequential", "--temperature", 0, "--max-new-tokens", 8),
        *("--seeds", 20, "--prompts", prompts, *pair, "--plot", tmp_path / "audit.png"),
    )
    assert code == 1
    assert "FAIL" in out and "a required check failed" in out
    assert "position 1" in out.replace("\n", " ") and "in native's context" in out.replace("\n", " ")
    assert (tmp_path / "audit.png").stat().st_size > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--verify", "none"], "verify must be one of exact, temporal, both"),
        (["--strategies", "sequential,random"], "strategy must be one of"),
        (["--items", "0"], "--items must be at least 1"),
        (["--items", "2", "--prompts", "x.txt"], "leave out --items"),
        (["--prompts", "/nowhere/x.txt"], "cannot be read"),
        (["--json", "/nowhere/x.json"], "cannot be written"),
        (["--plot", "audit.gif"], "must end in .png, .svg, .pdf"),
        (["--batch", "0"], "batch must be an integer >= 1"),
        (["--surprise"], "No such option"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_bad_options_are_one_line_and_exit_code_2(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("simsd: error: ") and message in err


def test_interrupt_shows_what_was_checked_until_then(run, pair, prompts, monkeypatch, tmp_path):
    def interrupted(subject):
        raise KeyboardInterrupt

    monkeypatch.setattr(leak, "exact_leak", interrupted)
    file = tmp_path / "audit.json"
    code, out, _ = run(
        *("--verify", "exact", "--strategies", "sequential", "--max-new-tokens", 4, "--prompts", prompts),
        *(*pair, "--json", file),
    )
    assert code == 130 and "interrupted" in out and "equality" in out
    written = json.loads(file.read_text())
    assert written["complete"] is False and {check["part"] for check in written["checks"]} == {"equality"}
