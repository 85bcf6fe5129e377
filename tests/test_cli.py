"""The command line as a whole, and simsd info."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from simsd.models.folders import BUILT_IN

pytestmark = pytest.mark.usefixtures("one_thread")


def test_info_shows_ops_versions_and_models(run):
    code, out, err = run("info")
    assert (code, err) == (0, "")
    for word in ("masked_attention", "transformers", "batch invariance", "thin_linear", *BUILT_IN):
        assert word in out


def test_info_as_json(run):
    code, out, _ = run("info", "--json")
    report = json.loads(out)
    assert code == 0 and set(report) == {"kernels", "versions", "batch_invariance", "models"}
    assert [model["name"] for model in report["models"]] == list(BUILT_IN)


def test_info_tries_torchs_linear_layer(monkeypatch):
    from simsd.cli.info import batch_invariance

    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight: x + (len(x) in (3, 5)))
    assert batch_invariance()["torch linear, cpu float32"].startswith("no: 3, 5 of 1 to 16 rows")
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight: x)
    assert batch_invariance()["torch linear, cpu float32"] == "yes at 1 to 16 rows (tried now)"
    monkeypatch.setattr(torch.nn.functional, "linear", None)
    assert "unknown (TypeError" in batch_invariance()["torch linear, cpu float32"]


def test_info_survives_broken_models(run, monkeypatch, tmp_path):
    (tmp_path / "tiny-target").mkdir()
    (tmp_path / "tiny-target" / "config.json").write_text("{")
    monkeypatch.setattr("simsd.cli.models.PAIR", tmp_path)
    code, out, _ = run("info")
    assert code == 0 and out.count("missing or damaged") == len(BUILT_IN)


# The command


NO_TORCH = """
import sys
sys.argv[0] = 'simsd'
from simsd.cli import main
for arguments in (['--help'], ['models'], ['--show-completion', 'bash']):
    try:
        main(arguments)
    except SystemExit as ended:
        assert not ended.code, (arguments, ended.code)
sys.exit('torch' in sys.modules or 'transformers' in sys.modules)
"""


def test_help_models_and_completion_do_not_import_torch():
    # Which shell it is would be looked up among the parent processes, which here are none.
    environment = os.environ | _path() | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run([sys.executable, "-c", NO_TORCH], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout and "bench" in done.stdout and "tiny-target" in done.stdout
    assert "_SIMSD_COMPLETE=complete_bash" in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("simsd", "ge"), ["generate"]),
        (("simsd", "generate", "--verify", "t"), ["temporal"]),
        (("simsd", "generate", "--target", ""), list(BUILT_IN)),
        (("simsd", "generate", "--draft", ""), ["tiny-draft", "long-draft", "none"]),
        (("simsd", "bench", "--strategy", "low"), ["low_confidence_static", "low_confidence_dynamic"]),
        (("simsd", "mask", "slid"), ["sliding-window"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_shell_completes_commands_and_values(run, monkeypatch, words, expected):
    monkeypatch.setenv("_SIMSD_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    code, out, _ = run()
    assert code == 0 and out.split() == expected


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
