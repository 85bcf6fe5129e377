"""The thread that drives the engine, and the endpoints in one process: who leaves, what fails, what is refused."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from fastapi.testclient import TestClient

import simsd
from server_process import PATIENCE, eventually
from simsd.config import SamplingParams
from simsd.serve.app import build_app
from simsd.serve.gate import Gate, Settings
from simsd.serve.service import MAX_FAILED, Draining, Service, Stopped
from stand_ins import random_sdar

pytestmark = pytest.mark.usefixtures("one_thread")

ENDLESS = SamplingParams(max_new_tokens=900, end_token_ids=(), verify="none")
HELLO = [293, 333]
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def tiny():
    return simsd.load("tiny-target")


@pytest.fixture
def service(tiny):
    return Service(simsd.Engine(tiny, max_batch=2, max_length=1000, max_queue=2))


@pytest.fixture
def client(service):
    with TestClient(build_app(service, Settings("tiny"))) as client:
        yield client


def within(seconds_work):
    return asyncio.run(asyncio.wait_for(seconds_work, PATIENCE))


def test_who_leaves_frees_the_slot_within_two_iterations(service):
    async def leave() -> int:
        service.start()
        with service.submit([(HELLO, ENDLESS)]) as running:
            arrivals = aiter(running)
            for _ in range(3):
                await anext(arrivals)
            before = service.engine.metrics().iterations
        while service.engine.metrics().running:
            await asyncio.sleep(0)
        taken = service.engine.metrics().iterations - before
        await service.close()
        return taken

    assert within(leave()) <= 2
    assert service.engine.metrics().finished == {"cancelled": 1}


def test_a_full_queue_takes_all_choices_of_a_request_or_none(service):
    async def crowd() -> None:
        service.start()
        with service.submit([(HELLO, ENDLESS)] * 3):
            with pytest.raises(simsd.QueueFull):
                service.submit([(HELLO, ENDLESS)] * 2)
            while (metrics := service.engine.metrics()).running + metrics.waiting != 3:
                await asyncio.sleep(0)
        await service.close()

    within(crowd())


def test_a_drained_service_takes_nothing_new_and_cuts_what_is_late(service):
    async def drain() -> simsd.Result:
        service.start()
        with service.submit([(HELLO, ENDLESS)]) as running:
            arrivals = aiter(running)
            while not (await anext(arrivals))[1].tokens:
                pass
            await service.drain(0)
            with pytest.raises(Draining):
                service.submit([(HELLO, ENDLESS)])
            last = [update async for _, update in arrivals][-1]
        await service.close()
        return last.result

    result = within(drain())
    assert result.finish_reason == "cancelled" and 0 < len(result.tokens) < 900


def test_an_iteration_that_raises_once_costs_nobody_anything(service, client, monkeypatch):
    expected = client.post(CHAT, json={"messages": MESSAGES}).json()["choices"][0]["message"]
    iterate, raised = service.engine.loop.iterate, []

    def sometimes() -> None:
        if len(raised) < 2 and service.engine.metrics().running:
            raised.append(None)
            raise RuntimeError("a passing fault")
        iterate()

    monkeypatch.setattr(service.engine.loop, "iterate", sometimes)
    answer = client.post(CHAT, json={"messages": MESSAGES})
    assert len(raised) == 2 and answer.json()["choices"][0]["message"] == expected
    assert client.get("/health").status_code == 200


def test_an_engine_that_cannot_go_on_is_told_to_all_who_wait_and_by_health(service, client, monkeypatch):
    def broken() -> None:
        raise RuntimeError("nothing works\nany more")

    monkeypatch.setattr(service.engine.loop, "iterate", broken)
    answer = client.post(CHAT, json={"messages": MESSAGES})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the engine has stopped: nothing works any more; see the server's log"
    health = client.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "stopped")
    assert client.post(CHAT, json={"messages": MESSAGES}).status_code == 500


@pytest.fixture
def failing(service, client, tiny, monkeypatch):
    """Every text fails behind its first tokens."""

    def nothing(*_, **__):
        raise ValueError("no such token")

    monkeypatch.setattr("simsd.text.GrowingText.push", nothing)
    return client


def test_a_text_that_fails_is_a_500_and_an_error_event_never_a_silent_end(failing):
    answer = failing.post(CHAT, json={"messages": MESSAGES})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "choice 0 failed: the text cannot be decoded: no such token"
    *_, last = failing.post(CHAT, json={"messages": MESSAGES, "stream": True}).text.strip().split("\n\n")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["type"] == "server_error" and "no such token" in error["message"]


def test_health_says_when_every_request_fails(failing):
    for count in range(MAX_FAILED):
        assert failing.get("/health").status_code == 200, count
        failing.post(CHAT, json={"messages": MESSAGES})
    assert (failing.get("/health").status_code, failing.get("/health").json()["status"]) == (503, "failing")


def test_a_bug_is_a_500_in_openai_s_shape(client, monkeypatch):
    monkeypatch.setattr("simsd.serve.answers.Answer.whole", lambda self: 1 / 0)
    answer = client.post(CHAT, json={"messages": MESSAGES})
    assert answer.status_code == 500 and "a bug in the server: ZeroDivisionError" in answer.json()["error"]["message"]


def test_temporal_without_a_draft_model_is_refused(client):
    answer = client.post(CHAT, json={"messages": MESSAGES, "verify": "temporal"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "verify"
    answer = client.post(CHAT, json={"messages": MESSAGES, "drafter": "model"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "drafter"


def test_the_limit_of_a_short_memory_is_the_model_s_length(tiny):
    from simsd.engine.pages import page_bytes

    engine = simsd.Engine(tiny, max_batch=1, max_length=1000, page_size=16, kv_memory=10 * page_bytes(tiny, 16))
    with TestClient(build_app(Service(engine), Settings("tiny"))) as client:
        most = client.get("/v1/models/tiny").json()["max_model_len"]
        assert most == engine.metrics().pages * 16 < 1000
        body = {"prompt": HELLO, "ignore_eos": True}
        assert client.post("/v1/completions", json=body).json()["usage"]["total_tokens"] == most
        answer = client.post("/v1/completions", json=body | {"max_tokens": most})
        assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(simsd.SimsdError, match="has no tokenizer"):
        Service(simsd.Engine(random_sdar(0)))


async def lingering(scope, receive, send) -> None:
    """An application that answers in two parts."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"a part", "more_body": True})


def scope(path: str = "/") -> dict:
    return {"type": "http", "path": path, "method": "POST", "headers": []}


def test_a_reader_that_takes_nothing_is_left_when_the_time_is_over(caplog):
    async def receive() -> dict:
        return {"type": "http.request"}

    async def stuck(message) -> None:
        await asyncio.sleep(PATIENCE)

    began = time.monotonic()
    with caplog.at_level("INFO", "simsd.serve"):
        within(Gate(lingering, Settings("m", timeout=0.05))(scope(), receive, stuck))
    assert time.monotonic() - began < PATIENCE / 2
    assert " left " in caplog.text and "the client takes nothing" in caplog.text


def test_a_client_that_leaves_while_it_sends_is_no_error(caplog):
    async def receive() -> dict:
        return {"type": "http.disconnect"}

    with caplog.at_level("INFO", "simsd.serve"):
        within(Gate(lingering, Settings("m"))(scope("/a\nb"), receive, None))
    assert "POST /a\\nb left" in caplog.text


def test_stopped_is_raised_for_what_comes_later(service):
    service.error = "gone"
    with pytest.raises(Stopped, match="gone"):
        service.submit([(HELLO, ENDLESS)])


def test_a_stream_s_client_that_leaves_is_noticed_between_chunks(service, client):
    body = {"messages": MESSAGES, "stream": True, "max_tokens": 900, "ignore_eos": True}

    async def leave() -> None:
        sent, left = [], asyncio.Event()
        pieces = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive() -> dict:
            if pieces:
                return pieces.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message) -> None:
            sent.append(message)
            if len(sent) == 5:
                left.set()

        asked = scope(CHAT) | {
            "headers": [(b"content-type", b"application/json")],
            "query_string": b"",
            "http_version": "1.1",
            "scheme": "http",
            "server": ("x", 80),
            "root_path": "",
        }
        await client.app(asked, receive, send)
        assert sent[-1]["more_body"]  # it did not come to its end

    client.portal.call(leave)
    eventually(lambda: not service.engine.metrics().running)
