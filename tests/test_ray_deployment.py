"""simsd serve --replicas: two replicas behind one address, one of which is killed under load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

import simsd
from simsd import SimsdError

pytest.importorskip("ray")
openai = pytest.importorskip("openai")

from benchmarks.cpu.ray_faults import REPLICA, actors  # noqa: E402
from simsd.ray.deployment import app  # noqa: E402

QUESTIONS = [f"What is {a} + {b}?" for a in range(4) for b in range(4)]
SAMPLED = {"temperature": 0.8, "max_tokens": 32}
COMMAND = [sys.executable, "-m", "simsd", "serve", "tiny-target", "--draft", "tiny-draft", "--port", "0"]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process of `simsd serve --replicas 2`, and its URL."""
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as errors:
        process = subprocess.Popen([*COMMAND, "--replicas", "2"], stdout=subprocess.PIPE, stderr=errors, text=True)
    line = process.stdout.readline()
    assert line.startswith("serving tiny-target at http://127.0.0.1:"), log.read_text()
    yield process, line.split()[3]
    process.terminate()
    process.wait(60)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server[1], api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def alone() -> list[str]:
    results = simsd.generate(
        "tiny-target", QUESTIONS, "tiny-draft", temperature=0.8, max_new_tokens=32, seed=range(len(QUESTIONS))
    )
    return [result.text for result in results]


def ask(client, number: int) -> str:
    messages = [{"role": "user", "content": QUESTIONS[number]}]
    answer = client.chat.completions.create(model="tiny-target", messages=messages, seed=number, **SAMPLED)
    return answer.choices[0].message.content


def test_replicas_give_the_text_of_one_process_whole_and_as_a_stream(client, alone):
    assert [ask(client, number) for number in range(4)] == alone[:4]
    messages = [{"role": "user", "content": QUESTIONS[5]}]
    chunks = client.chat.completions.create(model="tiny-target", messages=messages, seed=5, stream=True, **SAMPLED)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == alone[5]


def test_what_one_server_refuses_replicas_refuse(client):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny-target", prompt="hello", temperature=-1)
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.completions.create(model="gpt-4", prompt="hello")


def test_a_replica_that_is_killed_under_load_is_replaced_and_every_question_answered(server, client, alone):
    before = actors(REPLICA)
    assert len(before) == 2
    texts: dict[int, set[str]] = {number: set() for number in range(len(QUESTIONS))}
    stop = threading.Event()

    def keep_asking(numbers: range) -> None:
        while not stop.is_set():
            for number in numbers:
                try:
                    texts[number].add(ask(client, number))
                except openai.APIError:  # it was at the replica that died: asked again
                    time.sleep(0.05)

    clients = [threading.Thread(target=keep_asking, args=(range(i, len(QUESTIONS), 4),)) for i in range(4)]
    for one in clients:
        one.start()
    try:
        os.kill(before[0], signal.SIGKILL)
        until = time.monotonic() + 120
        while len(set(actors(REPLICA)) - {before[0]}) < 2 or not all(texts.values()):
            assert time.monotonic() < until, "the replica was not replaced"
            time.sleep(0.1)
    finally:
        stop.set()
        for one in clients:
            one.join(60)
    assert texts == {number: {text} for number, text in enumerate(alone)}


def test_sigterm_lets_answers_end_and_exits_with_0(server, client):
    process, _ = server
    chunks = client.completions.create(
        model="tiny-target", prompt="hello", max_tokens=256, stream=True, extra_body={"ignore_eos": True}
    )
    next(chunks)
    process.terminate()
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert process.wait(60) == 0


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"autoscale": "3"}, "autoscale must be MIN:MAX"),
        ({"autoscale": "3:1"}, "autoscale must be MIN:MAX"),
        ({"autoscale": "0:1"}, "autoscale must be MIN:MAX"),
        ({"model": "no-model"}, "no checkpoint 'no-model'"),
        ({"max_batch": "0"}, "max_batch must be"),
        ({"replicas": "0"}, "replicas=0: Input should be greater than or equal to 1"),
        ({"replicas": "many"}, "replicas=many: Input should be a valid integer"),
        ({"modell": "tiny-target"}, "modell=tiny-target: Extra inputs are not permitted"),
    ],
    ids=["one number", "backwards", "none", "model", "engine", "no replicas", "no number", "unknown"],
)
def test_wrong_arguments_are_refused_in_one_line(wrong, words):
    with pytest.raises(SimsdError) as refused:
        app(wrong)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_more_replicas_than_the_machine_has_cpus_are_refused_at_once(run, ray_cluster, assert_one_line_error):
    refused = run("serve", "tiny-target", "--port", 0, "--replicas", 3)
    assert_one_line_error(refused, "3 processes of 1 CPUs each need 3 CPUs, and the Ray cluster has 2")


def test_no_queue_at_all_is_a_setting_as_on_one_server():
    assert app({"max_queue": "0", "device": "cpu"}) is not None
