"""`simsd.ray.batch`: the texts of a data set, decoded by workers all over a Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simsd.config import GenerationConfig, SamplingParams, config_with, integer
from simsd.errors import SimsdError, one_line
from simsd.ray.cluster import check_room, configured, connect, worker_device

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

    from simsd.ray.worker import Work

SHARD_ROWS = 512
TOLD_EVERY = 10.0  # seconds between two lines of progress


@dataclasses.dataclass(frozen=True)
class Report:
    """What has become of a job.

    Attributes:
        output: the folder of results, to be read with `ray.data.read_parquet` or `pandas.read_parquet`.
        rows: of the whole data set, all of which are there. failed: those of them that have an `error`.
        decoded: rows that this call did; the others were there before.
        tokens: that these have. seconds: that they took, with the start of the workers.
    """

    output: Path
    rows: int
    failed: int
    decoded: int
    tokens: int
    seconds: float


def batch(
    rows: ray.data.Dataset | Iterable[Any],
    target: str | Path,
    draft: str | Path | None = None,
    config: GenerationConfig | Mapping | None = None,
    *,
    output: str | Path,
    prompt: str = "prompt",
    id: str | None = None,
    workers: int = 1,
    cpus: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    shard_rows: int = SHARD_ROWS,
    progress: bool = True,
    **settings: Any,
) -> Report:
    """Decodes a prompt per row and writes the results to a folder, a Parquet file per shard of rows.

    Each row's text is that of `simsd.generate` with its prompt, the same settings and its seed, which is
    `simsd.seeds.row_seed(seed, id)`: it does not depend on who decodes it, beside what, or in which order. A row that
    cannot be decoded has its `error` and stops nobody. When a worker dies its shard is done again by another. When this
    process does, call it again with the same arguments: only rows that have no result yet are decoded.

    Columns of the results: id, text, tokens, finish_reason, error, seed, prompt_tokens (their number),
    target_forwards, draft_forwards.

    Args:
        rows: a list of prompts (each as `Engine.add` takes it) or of dicts with them, or a Ray dataset.
        target, draft: names, checkpoint folders or hub ids, which every node must have.
        config: `GenerationConfig` or a dict of its fields; settings by name override it. With `max_batch` rows at a
            time a worker decodes. `n` is 1, and `seed` one int, or None for one that is drawn and kept for the job.
        settings: also quantize, family, mask_token_id, shift, revision and local_files_only, as `simsd.load` takes
            them, and draft_family, draft_shift and draft_revision.
        output: a folder of the machine that this process runs on, a new or an empty one, or that of the same job.
        prompt: the column of prompts.
        id: the column of ids, integers or strings that differ; None: a list's rows are numbered from 0.
        workers: processes at most, each with an engine; they start as the cluster has room for them.
        cpus: of a worker, and threads that it computes with.
        device: of a worker: "cpu", "cuda" (one GPU) or "auto": cuda, if the cluster has a GPU.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        shard_rows: rows that a worker gets at a time and that are lost with it; well above `max_batch`, as a shard's
            last rows run in a batch that empties.
        progress: whether lines on standard error tell how far it is.

    Raises:
        SimsdError: Ray is missing; a wrong argument, model, row or output; what the engine raises; a shard whose
            workers have died again and again. What is done by then stays.
    """
    from simsd.engine.pair import SETTINGS  # loads torch, which the command line's help does without

    taken = {"device", "dtype", *(field.name for field in dataclasses.fields(GenerationConfig))}
    loading = {name: settings.pop(name) for name in SETTINGS if name in settings and name not in taken}
    loading = {name: value for name, value in loading.items() if value is not None}
    others = ("rows", "target", "draft", "config", *batch.__kwdefaults__, *SETTINGS)
    config = config_with(config, settings, others=others)
    if config.n != 1 or isinstance(config.seed, tuple):
        raise SimsdError("a row has one text and the job one seed, got n or seed for several: give a row per text")
    for name, value in (("workers", workers), ("cpus", cpus), ("shard_rows", shard_rows)):
        integer(name, value, 1)
    for name, value in (("target", target), ("draft", draft)):
        if not isinstance(value, str | Path) and (value is not None or name == "target"):
            raise SimsdError(f"{name} must be a name or a folder, which workers load, got {type(value).__name__}")
    connect("ray.data")
    import pyarrow as pa

    from simsd.ray.output import Output, fingerprint
    from simsd.ray.rows import scan, source_of
    from simsd.ray.worker import Work
    from simsd.seeds import fresh_seed

    began, device = time.perf_counter(), worker_device(device, cpus)
    with configured(rows), _errors(), contextlib.ExitStack() as stack:
        source = source_of(rows, id, prompt)
        if not isinstance(source, pa.Table):
            check_room(workers, cpus, readers=1)
        results = stack.enter_context(Output(output))
        ids, digest = scan(source)
        if config.seed is None:
            config = dataclasses.replace(config, seed=(results.manifest() or {}).get("seed", fresh_seed()))
        models = {name: str(model) for name, model in (("target", target), ("draft", draft)) if model is not None}
        work = Work(models["target"], models.get("draft"), config, device, {"dtype": str(dtype)} | loading, cpus)
        prints = {f"{name} checkpoint": fingerprint(model) for name, model in models.items()}
        results.claim({"rows": len(ids), "data": digest} | models | prints | _settings(work))
        done, failed = results.done()
        before = 0 if done is None else len(done)
        told = _Progress(len(ids), before, failed, shown=progress)
        if before < len(ids):
            for part in _decoded(source, done, work, workers, shard_rows):
                results.add(part)
                told.add(part)
    seconds = time.perf_counter() - began
    return Report(results.folder, len(ids), told.failed, told.done - before, told.tokens, seconds)


def _decoded(
    source: pa.Table | ray.data.Dataset, done: pa.ChunkedArray | None, work: Work, workers: int, shard_rows: int
) -> Iterator[pa.Table]:
    """The results of the rows that are not `done`, shard by shard."""
    import ray.data

    from simsd.ray.rows import blocks, shards
    from simsd.ray.worker import Worker

    dataset = shards(source, done, shard_rows)
    # Ray Data starts workers that die again, and gives them their shards again, until nothing has come for half an hour
    # (RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S).
    results = dataset.map_batches(
        Worker,
        fn_constructor_args=(work,),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        num_cpus=work.cpus,
        num_gpus=1 if work.device == "cuda" else 0,
    )
    yield from blocks(results)


def _settings(work: Work) -> dict[str, Any]:
    """What a row's result depends on. `EngineConfig` is about speed, but for these two."""
    sampling = {field.name: getattr(work.config, field.name) for field in dataclasses.fields(SamplingParams)}
    shape = {name: getattr(work.config, name) for name in ("block_length", "max_length")}
    return sampling | shape | {"device": work.device} | work.loading


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """What a worker raised, as if it had been raised here."""
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayError

    try:
        yield
    except (RayError, ExecutionTimeoutError) as error:
        own: BaseException | None = error
        while own is not None and (not isinstance(own, SimsdError) or isinstance(own, RayError)):
            own = getattr(own, "cause", None) or own.__cause__
        if own is not None:
            raise type(own)(str(own).partition("\n")[0]) from error  # behind it Ray says how it would be tried again
        raise SimsdError(
            f"the job has ended early: {one_line(error)}; what is done stays, and the same call goes on from there"
        ) from error


class _Progress:
    """Counts rows, and tells of them on standard error."""

    def __init__(self, rows: int, before: int, failed: int, shown: bool) -> None:
        self.rows, self.done, self.failed, self.tokens, self._shown = rows, before, failed, 0, shown
        self._began = self._told = time.perf_counter()
        if shown and before:
            self._tell("are there from before")

    def add(self, part: pa.Table) -> None:
        self.done += part.num_rows
        self.failed += part.num_rows - part["error"].null_count
        self.tokens += sum(map(len, filter(None, part["tokens"].to_pylist())))
        now = time.perf_counter()
        if self._shown and (now - self._told > TOLD_EVERY or self.done == self.rows):
            self._told = now
            self._tell(f"done, {self.tokens / (now - self._began):.0f} tok/s")

    def _tell(self, what: str) -> None:
        failed = f", {self.failed} failed" if self.failed else ""
        print(f"{self.done:,} of {self.rows:,} rows {what}{failed}", file=sys.stderr, flush=True)
