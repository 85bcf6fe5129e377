"""benchmarks/cpu/serve.py in short: it finds nothing, and finds what is wrong."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from benchmarks import contest
from benchmarks.cpu import serve
from benchmarks.registry import BENCHMARKS

pytestmark = pytest.mark.usefixtures("one_thread")


def short(**changes) -> dict:
    made, one = contest.Bench(tiny=True), BENCHMARKS["serve"]
    settings = one.settings | one.short | changes
    del settings["threads"]
    serve.run(made, **settings)
    return {row["what"]: row["figure"] for row in made.rows}


def test_under_load_texts_are_right_and_nothing_is_lost():
    figures = short()
    assert figures["wrong or lost"] == 0
    assert figures["requests begun before SIGTERM"] == figures["of them to their end"] > 6
    assert figures["requests left by their clients"] > 0 and figures["requests to their end"] > 0


def test_a_wrong_text_is_found(monkeypatch):
    made = serve.jobs_of

    def other(*arguments):
        job, *others = made(*arguments)
        return [dataclasses.replace(job, text=job.text + "!"), *others]

    monkeypatch.setattr(serve, "jobs_of", other)
    with pytest.raises(RuntimeError, match="wrong: seed .*alone '.*!'"):
        short(seconds=1.0, clients=2)


def test_a_stream_that_is_cut_is_found():
    async def cut(reader, writer) -> None:
        await reader.readuntil(b"}]")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n" + b'data: {"choices": []}\n\n'.ljust(40, b"\n"))
        await writer.drain()
        writer.close()

    async def ask() -> None:
        job = serve.Job({"messages": [{}]}, "")
        async with await asyncio.start_server(cut, "127.0.0.1", 0) as listening:
            port = listening.sockets[0].getsockname()[1]
            async with serve.httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                await serve.ask(client, job, serve.Seen())

    with pytest.raises(RuntimeError, match=r"without \[DONE\]"):
        asyncio.run(ask())
