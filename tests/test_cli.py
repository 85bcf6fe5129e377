"""The command line as a whole, and simsd info."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")


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

    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight: x + (len(x) in (3, 5)))
    assert batch_invariance()["torch linear, cpu float32"].startswith("no: 3, 5 of 1 to 16 rows")
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
