"""A server under load: `simsd serve` in a process of its own, and clients on loopback that behave as clients do.

First one client asks for every text, one after the other. Then all clients stream at once for a while: half of the
requests are left at random, some clients read slowly, some send what is no request. At last SIGTERM comes while all of
them stream. Each text (of a request that was left: what came of it) is compared with that of the same request decoded
natively and alone, in this process. At the end no request may be left in the server, every page must be free, the
process no larger than after a quarter of the time but for a few MiB, and no stream that had begun may have been cut by
SIGTERM. Fails where anything was wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator

import httpx

from simsd import LoadedModel, generate, load, tasks

from .. import environment
from ..contest import Bench
from ..report import Table

TABLE = Table([("what", "{what}"), ("figure", "{figure}")])
GROWTH_MIB = 24  # that the server may grow by behind the first quarter: its allocator's arenas fill up for a while
JOBS_PER_FAMILY, IN_SHORT = 10, 2
SLOW_READERS = 8  # one client in so many
SLOW_SECONDS = 0.05  # before each part that a slow reader takes
MALFORMED_EVERY = 20  # requests of a client
JSON = {"Content-Type": "application/json"}
PATIENCE = 120.0
GRACE = 60
MALFORMED = (b"", b"{", b"[]", b'{"messages": 1}', b'{"messages": [], "n": 0}', b'{"prompt": "\\ud800"}', b"\xff" * 100)


@dataclasses.dataclass(frozen=True)
class Job:
    """A request, and the text that it has alone."""

    body: dict
    text: str


@dataclasses.dataclass
class Seen:
    """What clients saw. `begun`: streams that the server began. `first_texts`: seconds from a request to its first
    committed text."""

    begun: int = 0
    done: int = 0
    left: int = 0
    refused: int = 0
    tokens: int = 0
    first_texts: list[float] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)


def jobs_of(target: LoadedModel, per_family: int, seed: int) -> list[Job]:
    draw, jobs = random.Random(seed), []
    for task in (task for family in tasks.FAMILIES for task in tasks.held_out(family, per_family, seed)):
        settings = {
            "temperature": draw.choice((0.0, 0.7, 1.0, 2.0)),
            "seed": draw.randrange(-(2**63), 2**63),
            "strategy": draw.choice(("low_confidence_static", "low_confidence_dynamic", "sequential")),
        }
        count, endless = draw.choice((16, 32, 64, 96)), draw.random() < 0.5
        ends = () if endless else None
        (alone,) = generate(target, task.prompt, verify="none", max_new_tokens=count, end_token_ids=ends, **settings)
        messages = [{"role": "user", "content": task.prompt}]
        jobs.append(Job({"messages": messages, "max_tokens": count, "ignore_eos": endless, **settings}, alone.text))
    return jobs


@contextlib.contextmanager
def server(bench: Bench, slots: int, queue: int) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process and its URL."""
    command = [sys.executable, "-m", "simsd", "serve", "tiny-target", "--draft", "tiny-draft", "--port", "0"]
    command += ["--max-batch", str(slots), "--max-queue", str(queue), "--max-length", "512", "--grace", str(GRACE)]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    bench.logs.mkdir(parents=True, exist_ok=True)
    with (
        (bench.logs / "serve.log").open("w") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=variables, cwd=environment.ROOT
        ) as process,
    ):
        try:
            line = process.stdout.readline()
            if (found := re.search(r"at (http://\S+)/v1 ", line)) is None:
                raise RuntimeError(f"the server did not start: {(bench.logs / 'serve.log').read_text()[-500:]}")
            yield process, found[1]
        finally:
            process.kill()


async def metric(client: httpx.AsyncClient, name: str) -> float:
    exposition = (await client.get("/metrics")).text
    return float(re.search(rf"^simsd_{name} (\S+)$", exposition, re.MULTILINE)[1])


async def texts_of(client: httpx.AsyncClient, job: Job, seen: Seen) -> AsyncIterator[str]:
    """The parts of its text, behind "" as soon as the server begins to answer."""
    began, first, ended = time.perf_counter(), None, False
    body = job.body | {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {(await answer.aread()).decode()}")
        seen.begun += 1
        yield ""
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                ended = ended or line == "data: [DONE]"
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            seen.tokens += (chunk.get("usage") or {}).get("completion_tokens", 0)
            for choice in chunk["choices"]:
                if choice.get("ended_by") == "cancelled":
                    raise RuntimeError("cut by the server")
                if part := choice["delta"].get("content"):
                    if first is None:
                        first = time.perf_counter()
                        seen.first_texts.append(first - began)
                    yield part
    if not ended:
        raise RuntimeError("the stream ended without [DONE]")


async def ask(
    client: httpx.AsyncClient, job: Job, seen: Seen, leave_after: int | None = None, slow: bool = False
) -> None:
    """`leave_after`: parts after which the client leaves, None: it stays."""
    text, parts, left = "", 0, False
    async with contextlib.aclosing(texts_of(client, job, seen)) as stream:
        async for part in stream:
            text, parts = text + part, parts + 1
            if parts == leave_after:
                left = True
                break
            if slow:
                await asyncio.sleep(SLOW_SECONDS)
    seen.left, seen.done = seen.left + left, seen.done + (not left)
    if text != job.text if not left else not job.text.startswith(text):
        seen.wrong.append(f"seed {job.body['seed']}: {text!r}, alone {job.text!r}")


async def one_client(
    client: httpx.AsyncClient, jobs: list[Job], seen: Seen, number: int, until: float, leaving: float
) -> None:
    """Asks for one text after the other until then; leaves a share `leaving` of them."""
    draw, asked = random.Random(number), 0
    while time.monotonic() < until:
        asked += 1
        if asked % MALFORMED_EVERY == number % MALFORMED_EVERY:
            answer = await client.post("/v1/chat/completions", content=draw.choice(MALFORMED), headers=JSON)
            seen.refused += 1
            if answer.status_code != 400:
                seen.wrong.append(f"a malformed body was answered with {answer.status_code}")
        leave_after = draw.randint(1, 4) if draw.random() < leaving else None
        try:
            await ask(client, draw.choice(jobs), seen, leave_after, slow=number % SLOW_READERS == 0)
        except (httpx.HTTPError, RuntimeError) as error:
            seen.wrong.append(f"a request was lost: {type(error).__name__}: {error}")


def resident_mib(process: subprocess.Popen) -> float:
    with open(f"/proc/{process.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def watch(process: subprocess.Popen, sizes: list[float], seconds: float) -> None:
    while True:
        sizes.append(resident_mib(process))
        await asyncio.sleep(seconds / 100)


async def under_load(
    client: httpx.AsyncClient, process: subprocess.Popen, jobs: list[Job], clients: int, seconds: float
) -> tuple[Seen, list[float], float]:
    """What all clients saw, the server's size meanwhile, and its tokens per second."""
    seen, sizes = Seen(), []
    watching = asyncio.create_task(watch(process, sizes, seconds))
    before, began = await metric(client, "generated_tokens_total"), time.monotonic()
    until = began + seconds
    await asyncio.gather(*(one_client(client, jobs, seen, number, until, 0.5) for number in range(clients)))
    speed = (await metric(client, "generated_tokens_total") - before) / (time.monotonic() - began)
    watching.cancel()
    until = time.monotonic() + PATIENCE
    while await metric(client, "requests_running") + await metric(client, "requests_waiting"):
        if time.monotonic() > until:
            seen.wrong.append("requests that their clients have left are still in the server")
            break
        await asyncio.sleep(0.05)
    if lost := await metric(client, "pages") - await metric(client, "pages_free"):
        seen.wrong.append(f"{lost:.0f} pages are nobody's and not free")
    return seen, sizes, speed


async def terminated(client: httpx.AsyncClient, process: subprocess.Popen, jobs: list[Job], clients: int) -> Seen:
    """SIGTERM while clients stream: what has begun comes to its end, and what comes later is refused."""
    each = [Seen() for _ in range(clients)]
    streams = [asyncio.create_task(ask(client, jobs[i % len(jobs)], seen)) for i, seen in enumerate(each)]
    until = time.monotonic() + PATIENCE
    while sum(seen.begun for seen in each) <= clients * 3 // 4 and time.monotonic() < until:
        await asyncio.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    outcomes = await asyncio.gather(*streams, return_exceptions=True)
    code = await asyncio.to_thread(process.wait, PATIENCE)
    last = Seen(begun=sum(seen.begun for seen in each), done=sum(seen.done for seen in each))
    for seen, outcome in zip(each, outcomes, strict=True):
        last.wrong += seen.wrong
        if seen.begun and isinstance(outcome, Exception):
            last.wrong.append(f"a request was lost by SIGTERM: {type(outcome).__name__}: {outcome}")
    if code:
        last.wrong.append(f"the server ended with exit code {code}")
    return last


async def measure(
    process: subprocess.Popen, url: str, jobs: list[Job], clients: int, seconds: float
) -> tuple[dict[str, object], list[str]]:
    """Figures, and what was wrong."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
        alone, began = Seen(), time.monotonic()
        for job in jobs:
            await ask(client, job, alone)
        one_by_one = alone.tokens / (time.monotonic() - began)
        seen, sizes, speed = await under_load(client, process, jobs, clients, seconds)
        last = await terminated(client, process, jobs, clients)
    wrong = [*alone.wrong, *seen.wrong, *last.wrong]
    quarter = max(len(sizes) // 4, 1)
    grown = max(sizes[quarter:], default=sizes[0]) - max(sizes[:quarter])
    if grown > GROWTH_MIB:
        wrong.append(f"the server grew by {grown:.0f} MiB behind the first quarter")
    for name in ("done", "left", "refused"):
        if not getattr(seen, name):
            wrong.append(f"no request was {name}: this proves nothing of it")
    percentiles = statistics.quantiles(seen.first_texts, n=100, method="inclusive")
    return {
        "clients": clients,
        "requests to their end": seen.done,
        "requests left by their clients": seen.left,
        "malformed requests, refused": seen.refused,
        "requests begun before SIGTERM": last.begun,
        "of them to their end": last.done,
        "wrong or lost": len(wrong),
        "tokens/s, one request by one": round(one_by_one, 1),
        "tokens/s, all clients": round(speed, 1),
        "times as many": round(speed / one_by_one, 2),
        "ms to the first committed text, alone (median)": round(1e3 * statistics.median(alone.first_texts), 1),
        "ms to the first committed text, p50": round(1e3 * percentiles[49], 1),
        "ms to the first committed text, p99": round(1e3 * percentiles[98], 1),
        "MiB of the server": round(max(sizes), 1),
        "MiB behind the first quarter": round(grown, 1),
    }, wrong


def run(bench: Bench, clients: int, seconds: float, slots: int, seed: int) -> None:
    jobs = jobs_of(load("tiny-target"), IN_SHORT if bench.tiny else JOBS_PER_FAMILY, seed)
    with server(bench, slots, queue=4 * clients) as (process, url):
        figures, wrong = asyncio.run(measure(process, url, jobs, clients, seconds))
    for what, figure in figures.items():
        bench.row(TABLE, what=what, figure=figure)
    for found in wrong[:20]:
        bench.note(found)
    if wrong:
        raise RuntimeError(f"{len(wrong)} wrong: {'; '.join(wrong)[:1000]}")
