"""What dies on a Ray cluster, and what becomes of the work: batch jobs and replicas of the server, under kills.

First `simsd batch` decodes some thousand rows with two workers, on a cluster of this machine. In turn a worker and the
job's own process are killed (SIGKILL); after the latter the same command is given again. At the end every row must be
there once, with the tokens that it has alone in this process, decoded natively.

Then `simsd serve --replicas 2` answers clients who ask without a pause, while its replicas are killed one by one. Who
gets no complete answer asks again. Every answer must be the text that the request has alone, each replica must be
replaced, and SIGTERM must end the server with exit code 0. Fails where anything was wrong.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from simsd import Result, generate, load, tasks
from simsd.seeds import row_seed

from .. import processes
from ..contest import Bench
from ..report import Table

TABLE = Table([("what", "{what}"), ("figure", "{figure}")])
WORKER, REPLICA = "MapWorker", "ServeReplica"  # in what Ray calls the processes
COUNT = 2  # of either
TOKENS = 48
TEMPERATURE = 0.8
PATIENCE = 300.0  # seconds
MODELS = ("tiny-target", "tiny-draft")


def actors(name: str) -> list[int]:
    """The pids of Ray's actors with `name` in their own, of clusters that this process or a child of it has started."""
    parents, titles = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue  # gone meanwhile

    def is_ours(pid: int) -> bool:
        while pid > 1 and pid != os.getpid():
            pid = parents.get(pid, 0)
        return pid == os.getpid()

    return sorted(pid for pid, title in titles.items() if title.startswith("ray::") and name in title and is_ours(pid))


def wait_for(condition: Callable[[], object], what: str) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > until:
            raise RuntimeError(f"{what}: not within {PATIENCE:g} s")
        time.sleep(0.02)


def run(bench: Bench, rows: int, shard_rows: int, kills: int, clients: int, seconds: float, seed: int) -> None:
    draw = random.Random(seed)
    prompts = [tasks.training_item(draw.choice(tasks.FAMILIES), draw).prompt for _ in range(rows)]
    seeds = [row_seed(seed, row) for row in range(rows)]
    # Natively and here: what the workers and the replicas do must not show.
    alone = generate(
        load(MODELS[0]),
        prompts,
        verify="none",
        seed=seeds,
        temperature=TEMPERATURE,
        max_new_tokens=TOKENS,
        max_batch=32,
    )
    with tempfile.TemporaryDirectory() as folder:
        figures, wrong = batch(Path(folder), prompts, alone, shard_rows, kills, seed)
        served, more = serve(Path(folder), prompts, alone, clients, seconds, kills, draw)
    for what, figure in (figures | served).items():
        bench.row(TABLE, what=what, figure=figure)
    for found in (wrong := wrong + more)[:20]:
        bench.note(found)
    if wrong:
        raise RuntimeError(f"{len(wrong)} wrong: {'; '.join(wrong)[:1000]}")


def batch(
    folder: Path, prompts: list[str], alone: list[Result], shard_rows: int, kills: int, seed: int
) -> tuple[dict[str, object], list[str]]:
    import pyarrow.parquet as pq
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=COUNT, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    file, output = folder / "prompts.jsonl", folder / "results"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    command = [sys.executable, "-m", "simsd", "batch", str(file), str(output), "--workers", str(COUNT)]
    command += ["--shard-rows", str(shard_rows), "--seed", str(seed), "--temperature", str(TEMPERATURE)]
    command += ["--max-new-tokens", str(TOKENS)]
    variables = processes.environment() | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    counts = {"workers": 0, "jobs": 0}

    def parts() -> int:
        return len(list(output.glob("part-*.parquet")))

    with (folder / "batch.log").open("w") as log:

        def start() -> subprocess.Popen:
            return subprocess.Popen(command, env=variables, stderr=log)

        began, job = time.perf_counter(), start()
        try:
            for number in range(1, kills + 1):
                at = number * len(prompts) // shard_rows // (kills + 1)
                over = job.poll  # of the process that runs now
                wait_for(lambda at=at, over=over: (parts() >= at and actors(WORKER)) or over() is not None, "results")
                if over() is not None:
                    break
                if number % 2:
                    os.kill(actors(WORKER)[0], signal.SIGKILL)
                    counts["workers"] += 1
                else:
                    job.kill()
                    job.wait()
                    counts["jobs"] += 1
                    job = start()
            code = job.wait(PATIENCE * 4)
        finally:
            job.kill()
            ray.shutdown()
    took = time.perf_counter() - began
    found = [row for part in output.glob("part-*.parquet") for row in pq.read_table(part).to_pylist()]
    tokens = {row["id"]: row["tokens"] for row in found}
    lost = [row for row in range(len(prompts)) if row not in tokens]
    differ = [row for row, result in enumerate(alone) if row in tokens and tokens[row] != result.tokens]
    wrong = [f"row {row} is lost" for row in lost] + [f"row {row} has other tokens than alone" for row in differ]
    if code:
        wrong.append(f"simsd batch ended with {code}: {(folder / 'batch.log').read_text()[-500:]}")
    if sum(counts.values()) < kills:
        wrong.append(f"the job was over after {sum(counts.values())} of {kills} kills: more rows are needed")
    figures = {
        "batch: rows": len(prompts),
        "batch: workers killed": counts["workers"],
        "batch: rows that these had in hand, at most": counts["workers"] * shard_rows,
        "batch: times that the job itself was killed": counts["jobs"],
        "batch: rows lost": len(lost),
        "batch: rows twice": len(found) - len(tokens),
        "batch: rows with other tokens than alone": len(differ),
        "batch: seconds, starts included": round(took),
    }
    return figures, wrong + [f"{len(found) - len(tokens)} rows are there twice"] * (len(found) > len(tokens))


@dataclasses.dataclass
class Seen:
    """By clients. `again`: requests without a complete answer, which were asked again."""

    answers: int = 0
    again: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)


def serve(
    folder: Path, prompts: list[str], alone: list[Result], clients: int, seconds: float, kills: int, draw: random.Random
) -> tuple[dict[str, object], list[str]]:
    command = [sys.executable, "-m", "simsd", "serve", MODELS[0], "--draft", MODELS[1], "--port", "0"]
    command += ["--replicas", str(COUNT)]
    seen, stop, killed = [Seen() for _ in range(clients)], threading.Event(), 0
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen(command, env=processes.environment(), stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            line = server.stdout.readline()
            if not line:
                raise RuntimeError(f"the server did not start: {(folder / 'serve.log').read_text()[-500:]}")
            url = line.split()[3]
            threads = [
                threading.Thread(target=ask, args=(url, prompts, alone, one, stop, random.Random(draw.random())))
                for one in seen
            ]
            for thread in threads:
                thread.start()
            for _ in range(kills):
                time.sleep(seconds / (kills + 1))
                wait_for(lambda: len(actors(REPLICA)) == COUNT, "a replica in the place of the one that was killed")
                os.kill(draw.choice(actors(REPLICA)), signal.SIGKILL)
                killed += 1
            wait_for(lambda: len(actors(REPLICA)) == COUNT, "a replica in the place of the one that was killed")
            time.sleep(seconds / (kills + 1))
            stop.set()
            for thread in threads:
                thread.join(PATIENCE)
            server.terminate()
            code = server.wait(PATIENCE)
        finally:
            stop.set()
            server.kill()
    wrong = [found for one in seen for found in one.wrong]
    if code:
        wrong.append(f"simsd serve ended with {code}: {(folder / 'serve.log').read_text()[-500:]}")
    if idle := sum(not one.answers for one in seen):
        wrong.append(f"{idle} clients got no answer")
    figures = {
        "serve: clients": clients,
        "serve: answers": sum(one.answers for one in seen),
        "serve: replicas killed, and replaced": killed,
        "serve: requests that died with them, asked again": sum(one.again for one in seen),
        "serve: answers other than alone": sum(len(one.wrong) for one in seen),
    }
    return figures, wrong


def ask(
    url: str, prompts: list[str], alone: list[Result], seen: Seen, stop: threading.Event, draw: random.Random
) -> None:
    """One request after the other, each until it has its answer."""
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        while not stop.is_set():
            row = draw.randrange(len(prompts))
            body = {"model": MODELS[0], "messages": [{"role": "user", "content": prompts[row]}], "stream": True}
            body |= {"seed": alone[row].seed, "temperature": TEMPERATURE, "max_tokens": TOKENS}
            while (text := answer(client, body)) is None and not stop.is_set():
                seen.again += 1
                time.sleep(0.1)
            if text is not None:
                seen.answers += 1
                if text != alone[row].text:
                    seen.wrong.append(f"row {row}: {text!r} is served, {alone[row].text!r} alone")


def answer(client: httpx.Client, body: dict) -> str | None:
    """The text; None where the answer was not complete."""
    try:
        response = client.post("/chat/completions", json=body)
    except httpx.HTTPError:
        return None
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    if response.status_code != 200 or not events or events[-1] != "[DONE]":
        return None
    chunks = [json.loads(event) for event in events[:-1]]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
