"""What a worker of a job does: it holds an engine, and takes blocks of rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pyarrow as pa

from simsd.config import GenerationConfig
from simsd.engine.pair import check_params
from simsd.errors import OutOfMemoryError, SimsdError, one_line
from simsd.ray.engine import engine_of
from simsd.ray.rows import prompt_of
from simsd.results import Result
from simsd.seeds import row_seed

COLUMNS = {
    "text": pa.string(),
    "tokens": pa.list_(pa.int32()),
    "finish_reason": pa.string(),
    "error": pa.string(),
    "seed": pa.int64(),
    "prompt_tokens": pa.int32(),
    "target_forwards": pa.int32(),
    "draft_forwards": pa.int32(),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What all workers of a job do alike. `config.seed` is an int, of which rows' seeds are derived; `loading`: see
    `load_pair`."""

    target: str
    draft: str | None
    config: GenerationConfig
    device: str
    loading: dict[str, Any]
    cpus: int


class Worker:
    """A process of its own, with one engine for all its blocks."""

    def __init__(self, work: Work) -> None:
        self.config, self.error = work.config, None
        try:
            loading = work.loading | {"device": work.device, "block_length": work.config.block_length}
            self.engine = engine_of(work.target, work.draft, work.config.engine(), loading, work.cpus)
            check_params(self.engine.target, self.engine.draft, work.config.sampling(0), self.engine.block_length)
        except SimsdError as error:
            self.error = error  # raised by the first block: a worker that does not start is started again

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Columns `id` and `COLUMNS` of a block with columns `id` and `prompt`. A row that cannot be decoded has its
        `error`, and what else is known of it. Raises SimsdError where no row could be."""
        if self.error is not None:
            raise self.error
        places: dict[int, int] = {}
        answers = [dict.fromkeys(COLUMNS) for _ in range(rows.num_rows)]
        for place, (row, prompt) in enumerate(zip(rows["id"].to_pylist(), rows["prompt"].to_pylist(), strict=True)):
            seed = answers[place]["seed"] = row_seed(self.config.seed, row)
            try:
                places[self.engine.add(prompt_of(prompt), self.config.sampling(seed))] = place
            except Exception as error:  # its own, whatever a template or a tokenizer makes of it
                answers[place] |= {"finish_reason": "failed", "error": one_line(error)}
        while self.engine.busy:
            try:
                updates = self.engine.step()
            except OutOfMemoryError:
                raise  # no row's own fault: the settings must change
            except Exception:
                continue  # the engine finds out whose fault it is, and fails that request
            for update in updates:
                if update.result is not None:
                    answers[places[update.index]] = _columns(update.result)
        columns = {name: pa.array([answer[name] for answer in answers], kind) for name, kind in COLUMNS.items()}
        return pa.table({"id": rows["id"], **columns})


def _columns(result: Result) -> dict[str, object]:
    return {
        "text": result.text,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "error": result.error,
        "seed": result.seed,
        "prompt_tokens": len(result.prompt_tokens),
        "target_forwards": result.stats.target_forwards,
        "draft_forwards": result.stats.draft_forwards,
    }
