"""`simsd serve` as a process that is stopped, started wrongly, or behind a key and limits."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import socket
import sys

import httpx
import openai
import pytest

import simsd
from server_process import PATIENCE, eventually, serving

pytestmark = pytest.mark.usefixtures("one_thread")

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
LONG = {"messages": FRANCE, "max_tokens": 160, "ignore_eos": True}


def events_of(url: str, body: dict, started: list) -> list[dict]:
    """Those of a stream until it ends. `started` grows by one when the server answers, and by one for each of them."""
    events = []
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body | {"stream": True}, timeout=PATIENCE) as answer:
        started.append(None)
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))
                started.append(None)
            elif line == "data: [DONE]":
                return events
    raise AssertionError(f"the stream ended without [DONE], behind {events[-1:]}")


def text_of(events: list[dict]) -> str:
    return "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])


def ended_by(events: list[dict]) -> str:
    return next(choice["ended_by"] for event in events for choice in event["choices"] if "ended_by" in choice)


@pytest.fixture(scope="module")
def expected() -> str:
    settings = {"max_new_tokens": 160, "end_token_ids": ()}
    return simsd.generate("tiny-target", [FRANCE], "tiny-draft", **settings)[0].text


def stopped_under_load(server) -> list[list[dict]]:
    """Twelve streams on their way when SIGTERM comes, and what each of them was sent."""
    started: list[list] = [[] for _ in range(12)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        streams = [pool.submit(events_of, server.url, LONG, mine) for mine in started]
        eventually(lambda: all(started) and sum(len(mine) > 1 for mine in started) >= 4)
        assert server.terminate() == 0
        return [stream.result() for stream in streams]


def test_sigterm_lets_requests_end_and_refuses_new_ones(tmp_path, expected):
    with serving(tmp_path, "--max-batch", "4") as server:
        streams = stopped_under_load(server)
        assert [text_of(events) for events in streams] == [expected] * 12
        assert {ended_by(events) for events in streams} == {"length"}
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
        assert "Traceback" not in server.log.read_text()


def test_past_the_grace_requests_end_with_what_they_have(tmp_path, expected):
    with serving(tmp_path, "--max-batch", "4", "--grace", "0") as server:
        streams = stopped_under_load(server)
    assert all(expected.startswith(text_of(events)) for events in streams)
    assert "cancelled" in {ended_by(events) for events in streams}
    assert any(text_of(events) for events in streams)


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    options = ("--max-body", "0.01", "--timeout", "3", "--max-queue", "2", "--max-batch", "1", "--api-key", "säcret")
    more = ("--served-model-name", "small", "--allow-origin", "http://page")
    with serving(tmp_path_factory.mktemp("strict"), *options, *more) as running:
        yield running


KEY = {"Authorization": "Bearer säcret".encode()}


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer secret"}, {"Authorization": "säcret".encode()}])
@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/chat/completions", "/tokenize", "/metrics", "/openapi.json", "/nothing"]
)
def test_without_the_key_nothing_is_answered(strict, path, headers):
    for method in ("GET", "POST"):
        answer = httpx.request(method, f"{strict.url}{path}", headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert "säcret" not in answer.text


def test_the_key_of_the_official_client(strict):
    with pytest.raises(openai.AuthenticationError, match="wrong API key"):
        strict.client(api_key="other").models.list()
    assert httpx.get(f"{strict.url}/v1/models", headers=KEY).json()["data"][0]["id"] == "small"
    assert httpx.get(f"{strict.url}/health").status_code == 200


def test_a_body_over_the_limit_is_413(strict):
    url, large = f"{strict.url}/v1/completions", {"prompt": "a" * 20_000}
    assert httpx.post(url, json=large, headers=KEY).status_code == 413
    pieces = (b"x" * 1000 for _ in range(20))  # of a length that the client does not tell
    answer = httpx.post(url, content=pieces, headers=KEY)
    assert answer.status_code == 413 and "at most 10485 bytes" in answer.json()["error"]["message"]


def test_a_body_that_does_not_arrive_is_408(strict):
    port = int(strict.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer säcret\r\nContent-Length: 9\r\n\r\n{"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_past_the_time_limit_a_request_ends_with_what_it_has(strict):
    body = {"messages": FRANCE, "ignore_eos": True, "max_tokens": 1500, "strategy": "sequential", "verify": "none"}
    answer = httpx.post(f"{strict.url}/v1/chat/completions", json=body, headers=KEY, timeout=PATIENCE)
    (choice,) = answer.json()["choices"]
    if choice["ended_by"] != "length":  # on a machine that makes 500 tokens a second
        assert (choice["finish_reason"], choice["ended_by"]) == ("length", "deadline")
        assert choice["message"]["content"]


def test_those_over_the_queue_are_429_and_the_others_are_answered(strict):
    body = {"messages": FRANCE, "ignore_eos": True, "max_tokens": 100}

    async def all_of_them() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=PATIENCE, headers=KEY) as client:
            return await asyncio.gather(
                *(client.post(f"{strict.url}/v1/chat/completions", json=body) for _ in range(9))
            )

    answers = asyncio.run(all_of_them())
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused and {answer.status_code for answer in answers} == {200, 429}
    assert all(answer.headers["Retry-After"] == "1" for answer in refused)
    assert "the queue is full" in refused[0].json()["error"]["message"]
    texts = {answer.json()["choices"][0]["message"]["content"] for answer in answers if answer.status_code == 200}
    assert len(texts) == 1
    never = httpx.post(f"{strict.url}/v1/chat/completions", json=body | {"n": 4}, headers=KEY)
    assert never.status_code == 400 and "3 texts at most" in never.json()["error"]["message"]


def test_pages_of_named_origins_may_ask(strict):
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, allowed in (("http://page", True), ("http://elsewhere", False)):
        asked = httpx.options(f"{strict.url}/v1/completions", headers={"Origin": origin} | preflight)
        assert ("access-control-allow-origin" in asked.headers) == allowed
    answer = httpx.get(f"{strict.url}/v1/models", headers={"Origin": "http://page"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, "http://page")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--port", "99999"), "65535"),
        (("--host", "256.0.0.1"), "cannot listen on 256.0.0.1"),
        (("--host", "192.0.2.1", "--port", "0"), "cannot listen on 192.0.2.1, port 0"),
        (("--api-key", ""), "--api-key is empty"),
        (("--max-batch", "0"), "max_batch must be"),
        (("--max-queue", "-1"), "max-queue"),
        (("--grace", "inf"), "--grace must be a finite number, got inf"),
        (("--timeout", "nan"), "timeout"),
        (("--draft", "nowhere"), "nowhere"),
        (("--block-length", "99"), "block_length must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_options_are_one_line_and_exit_code_2(run, options, message):
    code, out, err = run("serve", "tiny-target", *options)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1] and "Traceback" not in err


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, out, err = run("serve", "tiny-target", "--port", taken.getsockname()[1])
    assert (code, out) == (2, "") and "Address already in use" in err and err.count("\n") == 1


def test_without_the_extra_it_says_what_to_install(run, monkeypatch, assert_one_line_error):
    monkeypatch.setitem(sys.modules, "simsd.serve.app", None)
    assert_one_line_error(run("serve"), 'simsd serve needs pip install "simsd-kernels[serve]"')
