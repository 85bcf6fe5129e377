"""simsd.ray.batch on a cluster of this machine: texts are those of one process, whoever dies meanwhile."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import byte_pair
import simsd
from plain_checkpoints import write_plain
from simsd import SimsdError
from simsd.seeds import row_seed

ray = pytest.importorskip("ray.data") and pytest.importorskip("ray")
pq = pytest.importorskip("pyarrow.parquet")

from benchmarks.cpu.ray_faults import WORKER, actors  # noqa: E402
from simsd.ray import Report, batch  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
QUESTIONS = [f"What is {a} + {b}?" for a in range(20) for b in range(20)]
SAMPLED = {"temperature": 0.8, "seed": 3, "max_new_tokens": 48}


def rows_of(folder: Path) -> dict:
    """Results by id."""
    rows = [row for part in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


@pytest.fixture(scope="module")
def alone() -> dict:
    """What one process makes of QUESTIONS."""
    seeds = [row_seed(SAMPLED["seed"], number) for number in range(len(QUESTIONS))]
    results = simsd.generate("tiny-target", QUESTIONS, "tiny-draft", **SAMPLED | {"seed": seeds})
    return dict(enumerate(results))


def assert_same(rows: dict, alone: dict) -> None:
    assert rows.keys() == alone.keys()
    for number, result in alone.items():
        row = rows[number]
        found = (row["tokens"], row["text"], row["finish_reason"], row["seed"], row["error"])
        assert found == (result.tokens, result.text, result.finish_reason, result.seed, None)


def wait_for(condition, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing has come of it"
        time.sleep(0.01)


def parts(folder: Path) -> int:
    return len(list(folder.glob("part-*.parquet")))


@dataclasses.dataclass
class Job:
    """`arguments` of the call that ended it, whose `report` it is. `first`: texts by row when the command was killed.
    `parts_at_kill`: that were there when a worker was killed."""

    arguments: dict
    report: Report
    first: dict[int, str]
    parts_at_kill: int


@pytest.fixture(scope="module")
def job(ray_cluster, tmp_path_factory) -> Job:
    """Begun by the command, which is killed; ended by a call, one of whose workers is killed."""
    file, folder, reports = tmp_path_factory.mktemp("prompts") / "prompts.jsonl", tmp_path_factory.mktemp("job"), []
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    command = [sys.executable, "-m", "simsd", "batch", str(file), str(folder), "--workers", "2", "--shard-rows", "10"]
    command += ["--temperature", "0.8", "--seed", "3", "--max-new-tokens", "48"]
    process = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": ray_cluster})
    wait_for(lambda: parts(folder) >= 3 or process.poll() is not None)
    process.kill()
    process.wait()
    first, before = {number: row["text"] for number, row in rows_of(folder).items()}, parts(folder)
    wait_for(lambda: not actors(WORKER))  # they end with who has asked for them

    arguments = {"rows": QUESTIONS, "target": "tiny-target", "draft": "tiny-draft", "output": folder} | SAMPLED
    thread = threading.Thread(target=lambda: reports.append(batch(**arguments, workers=2, shard_rows=5)))
    thread.start()
    wait_for(lambda: parts(folder) >= before + 2 and len(actors(WORKER)) == 2)
    os.kill(actors(WORKER)[0], signal.SIGKILL)
    at_kill = parts(folder) - before
    thread.join(120)
    return Job(arguments, *reports, first, at_kill)


def test_a_worker_that_is_killed_in_the_middle_costs_no_row_and_changes_no_text(job, alone):
    missing = len(QUESTIONS) - len(job.first)
    assert job.parts_at_kill < missing / 5
    assert (job.report.rows, job.report.decoded, job.report.failed) == (len(QUESTIONS), missing, 0)
    assert job.report.tokens == sum(len(alone[row].tokens) for row in alone if row not in job.first)
    assert_same(rows_of(job.report.output), alone)


def test_a_job_whose_own_process_was_killed_keeps_the_rows_that_were_done(job):
    assert 0 < len(job.first) < len(QUESTIONS) and job.report.decoded == len(QUESTIONS) - len(job.first)
    rows = rows_of(job.report.output)
    assert {row: rows[row]["text"] for row in job.first} == job.first


def test_a_call_that_finds_all_done_does_nothing(job):
    report = batch(**job.arguments)
    assert (report.rows, report.decoded, report.failed) == (len(QUESTIONS), 0, 0)


def test_the_guide_s_example_runs(ray_cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    guide = (Path(__file__).parents[1] / "docs/ray.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```py\n(.*?)```", guide, re.DOTALL)
    exec(compile(example, "docs/ray.md", "exec"), {})  # noqa: S102
    printed = capsys.readouterr().out
    assert printed.startswith("30 0\n") and "q29" in printed
    rows = rows_of(tmp_path / "results")
    assert rows.keys() == {f"q{n}" for n in range(30)}
    settings = {"temperature": 0.8, "max_new_tokens": 64, "stop": ["\n\n"], "seed": row_seed(0, "q7")}
    (expected,) = simsd.generate("tiny-target", "What is 7 + 4?", "tiny-draft", **settings)
    assert (rows["q7"]["tokens"], rows["q7"]["text"]) == (expected.tokens, expected.text)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"temperature": 0.5}, "temperature 0.8, and this one has 0.5"),
        ({"seed": 4}, "seed 3, and this one has 4"),
        ({"draft": None}, "draft"),
        ({"rows": QUESTIONS[:7]}, "rows 400, and this one has 7"),
        ({"rows": [*QUESTIONS[:-1], "What is 5 + 5?"]}, "data"),
    ],
    ids=["setting", "seed", "draft", "fewer rows", "another row"],
)
def test_results_of_another_job_are_not_mixed_with_this_one_s(job, change, words):
    with pytest.raises(SimsdError, match=words) as refused:
        batch(**job.arguments | change)
    assert "name another output" in str(refused.value) and "\n" not in str(refused.value)


def test_what_no_worker_could_decode_ends_the_job_with_one_line(ray_cluster, tmp_path):
    other = byte_pair.write_model(tmp_path / "other")
    with pytest.raises(SimsdError, match="draft .* does not fit target tiny-target") as refused:
        batch(["hello"], "tiny-target", str(other), output=tmp_path / "results")
    assert "\n" not in str(refused.value)


def test_a_job_in_which_nothing_comes_any_more_ends_with_one_line(ray_cluster, tmp_path, monkeypatch):
    # As by RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S, which Ray reads when it is imported: no worker starts so soon.
    monkeypatch.setattr(ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", 0.5)
    with pytest.raises(SimsdError, match="the job has ended early: .*; what is done stays") as ended:
        batch(["hello"], "tiny-target", output=tmp_path)
    assert "\n" not in str(ended.value)


def test_two_jobs_do_not_write_to_one_folder(ray_cluster, tmp_path):
    from simsd.ray.output import Output

    with Output(tmp_path), pytest.raises(SimsdError, match="another job writes to"):
        batch(["hello"], "tiny-target", output=tmp_path)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"rows": []}, "no rows"),
        ({"rows": "hello"}, "rows must be a list"),
        ({"rows": [{"text": "hello"}]}, "row 0 has no column 'prompt', it has text"),
        ({"rows": [{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}], "id": "id"}, "1 2 times: ids must differ"),
        ({"rows": [{"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"}], "id": "id"}, "all integers or all strings"),
        ({"rows": [{"prompt": "a"}], "id": "id"}, "row 0 has no column 'id'"),
        ({"rows": [b"hello"]}, "row 0: a prompt must be a string, a chat or token ids, got bytes"),
        ({"target": "no-model"}, "no checkpoint 'no-model'"),
        ({"target": None}, "target must be a name or a folder"),
        ({"device": "gpu"}, "device must be auto, cpu or cuda"),
        ({"cpus": 99}, "a worker needs 99 CPUs, and no node of the Ray cluster has more than 2"),
        ({"workers": 0}, "workers must be"),
        ({"n": 2}, "a row has one text"),
        ({"temprature": 1.0}, "did you mean temperature"),
        ({"output": "s3://bucket/results"}, "output must be a folder of this machine"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_wrong_arguments_are_refused_in_one_line(ray_cluster, tmp_path, wrong, words):
    with pytest.raises(SimsdError) as refused:
        batch(**{"rows": ["hello"], "target": "tiny-target", "output": tmp_path / "results"} | wrong)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_with_something_else_in_it_is_left_alone(ray_cluster, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SimsdError, match="holds other files .thesis.tex."):
        batch(["hello"], "tiny-target", output=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_does_not_say_its_family_is_decoded_as_told(ray_cluster, run, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    folder = write_plain(tmp_path / "model", "qwen3")
    (tmp_path / "prompts.txt").write_text("2 + 3\n")
    options = ("--target", folder, "--family", "qwen3", "--block-length", "8", "--shift", "--drafter", "self")
    code, _, err = run("batch", tmp_path / "prompts.txt", tmp_path / "out", *options, "--max-new-tokens", "12")
    assert code == 0, err
    loaded = simsd.load(folder, family="qwen3", block_length=8, shift=True)
    (expected,) = simsd.generate(loaded, ["2 + 3"], max_new_tokens=12, seed=row_seed(0, 0))
    assert rows_of(tmp_path / "out")[0]["tokens"] == expected.tokens
    told = {"family": "qwen3", "block_length": 8, "drafter": "self", "max_new_tokens": 12, "seed": 0}
    with pytest.raises(SimsdError, match="of a job with shift true, and this one has false"):
        batch(["2 + 3"], folder, output=tmp_path / "out", shift=False, **told)


def test_the_command_refuses_a_file_where_only_some_prompts_have_ids(ray_cluster, run, tmp_path, assert_one_line_error):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "prompt": "What is 3 + 4?"}\n"hello"\n')
    assert_one_line_error(run("batch", prompts, tmp_path / "results"), "1 of 2 prompts have an id")


def test_without_ray_one_line_says_what_to_install(run, tmp_path, monkeypatch, assert_one_line_error):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "simsd.ray.deployment", raising=False)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n")
    assert_one_line_error(run("batch", prompts, tmp_path / "out"), 'pip install "simsd-kernels[ray]"')
    assert_one_line_error(run("serve", "--replicas", 2, "--port", 0), 'pip install "simsd-kernels[ray]"')


def test_a_cluster_that_does_not_answer_is_named_at_once(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n")
    command = [sys.executable, "-m", "simsd", "batch", str(prompts), str(tmp_path / "out")]
    done = subprocess.run(
        command, env=os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1, done.stderr
    assert "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1 (" in done.stderr
