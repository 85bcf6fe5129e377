"""Rows of a job as every worker gets them: an id, and the prompt as JSON text, whatever its kind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from simsd.errors import SimsdError, one_line
from simsd.values import is_integer, plain

if TYPE_CHECKING:
    import ray.data

    Source = pa.Table | ray.data.Dataset  # with columns `id` and `prompt`


def source_of(rows: ray.data.Dataset | Iterable[Any], id_column: str | None, prompt_column: str) -> Source:
    """Rows with the columns `id` and `prompt`. See `simsd.ray.batch` for the arguments, and for what it raises."""
    import ray.data

    if isinstance(rows, ray.data.Dataset):
        return dataset_of(rows, id_column, prompt_column)
    if isinstance(rows, str | bytes | dict) or not isinstance(rows, Iterable):
        raise SimsdError(f"rows must be a list of prompts or of dicts, or a Ray dataset, got {type(rows).__name__}")
    return table_of(rows, id_column, prompt_column)


def table_of(rows: Iterable[Any], id_column: str | None, prompt_column: str) -> pa.Table:
    """Columns `id` and `prompt` of a list: of prompts, or of dicts that have them in the named columns.

    Raises:
        SimsdError: a row without the prompt's column or without an id, ids of two kinds, what is no data.
    """
    ids, prompts = [], []
    for number, row in enumerate(rows):
        given = isinstance(row, dict)
        if given and prompt_column not in row:
            raise SimsdError(f"row {number} has no column {prompt_column!r}, it has {_named(row)}: name the prompt's")
        if id_column is not None and not (given and id_column in row):
            raise SimsdError(f"row {number} has no column {id_column!r}: id names the column of the rows' ids")
        ids.append(number if id_column is None else plain(row[id_column]))
        prompts.append(_json(row[prompt_column] if given else row, ids[-1]))
    odd = next((i for i in ids if not (is_integer(i) or isinstance(i, str))), None)
    if odd is not None or len({type(i) for i in ids}) > 1:
        kinds = " and ".join(sorted({type(i).__name__ for i in ids}))
        raise SimsdError(f"ids must be all integers or all strings, got {kinds} in column {id_column!r}")
    try:
        column = pa.array(ids, pa.string() if ids and isinstance(ids[0], str) else pa.int64())
    except (pa.ArrowException, OverflowError, UnicodeError) as error:
        raise SimsdError(
            f"column {id_column!r} holds an id that is no 64-bit integer or text: {one_line(error)}"
        ) from None
    return pa.table({"id": column, "prompt": pa.array(prompts, pa.string())})


def dataset_of(dataset: ray.data.Dataset, id_column: str | None, prompt_column: str) -> ray.data.Dataset:
    """The same of a Ray dataset, whose order may differ from run to run.

    Raises:
        SimsdError: no id column is named, or a column that is named is not there.
    """
    if id_column is None:
        raise SimsdError('rows of a Ray dataset have no fixed order: name the column of their ids, as in id="id"')
    columns = dataset.columns() or []
    for name in (id_column, prompt_column):
        if name not in columns:
            raise SimsdError(f"the dataset has no column {name!r}, it has {_named(columns)}")
    names = {"id_column": id_column, "prompt_column": prompt_column}
    return dataset.map_batches(plain_rows, batch_size=None, batch_format="pyarrow", fn_kwargs=names)


def plain_rows(table: pa.Table, id_column: str, prompt_column: str) -> pa.Table:
    """Columns `id` (int64 or string) and `prompt` (JSON text) of a block."""
    ids, kind = table[id_column], table[id_column].type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise SimsdError(f"ids must be integers or strings, got {kind} in column {id_column!r}")
    if ids.null_count:
        raise SimsdError(f"{ids.null_count} rows have no id in column {id_column!r}")
    ids = ids.cast(pa.int64() if pa.types.is_integer(kind) else pa.string())
    prompts = [
        _json(plain(value), row) for value, row in zip(table[prompt_column].to_pylist(), ids.to_pylist(), strict=True)
    ]
    return pa.table({"id": ids, "prompt": pa.array(prompts, pa.string())})


def digests(rows: pa.Table) -> pa.Table:
    """Columns `id` and `digest` (uint64, of id and prompt)."""
    pairs = zip(rows["id"].to_pylist(), rows["prompt"].to_pylist(), strict=True)
    words = [hashlib.blake2b(f"{row}\0{prompt}".encode(), digest_size=8).digest() for row, prompt in pairs]
    return pa.table({"id": rows["id"], "digest": np.frombuffer(b"".join(words), np.uint64)})


def scan(source: Source) -> tuple[pa.ChunkedArray, str]:
    """All ids, and a digest of the data that does not depend on its order.

    Raises:
        SimsdError: no rows, or an id twice.
    """
    if isinstance(source, pa.Table):
        whole = digests(source)
    else:
        parts = blocks(source.map_batches(digests, batch_size=None, batch_format="pyarrow"))
        whole = pa.concat_tables([part for part in parts if part.num_rows] or [digests(table_of([], None, ""))])
    if not whole.num_rows:
        raise SimsdError("there are no rows")
    counts = pc.value_counts(whole["id"].combine_chunks())
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        first = twice[0].as_py()
        raise SimsdError(
            f"{len(twice)} ids are there more than once, {first['values']!r} {first['counts']} times: ids must differ"
        )
    total = int(whole["digest"].to_numpy().sum(dtype=np.uint64))  # modulo 2**64
    return whole["id"], f"{total:016x}"


def shards(source: Source, done: pa.ChunkedArray | None, shard_rows: int) -> ray.data.Dataset:
    """The rows whose ids are not `done`, in blocks of `shard_rows`."""
    import ray.data

    done = None if done is None else done.combine_chunks()
    if isinstance(source, pa.Table):
        # Cut here: on a cluster whose CPUs are all held by workers, no task would run.
        rows = source if done is None else without(source, done)
        cut = [rows.slice(i, shard_rows) for i in range(0, rows.num_rows, shard_rows)]
        return ray.data.from_arrow(cut)
    if done is not None:
        source = source.map_batches(without, batch_size=None, batch_format="pyarrow", fn_kwargs={"ids": done})
    return source.repartition(target_num_rows_per_block=shard_rows, strict=True)


def blocks(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    """As they come, in no fixed order."""
    return iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))


def without(rows: pa.Table, ids: pa.Array) -> pa.Table:
    """The rows that have none of these ids."""
    return rows.filter(pc.invert(pc.is_in(rows["id"], value_set=ids)))


def prompt_of(text: str) -> Any:
    """A prompt of its JSON text. Arrow fills up turns of a chat to equal keys: those that are empty go.

    Raises SimsdError for what is none.
    """
    prompt = json.loads(text)
    if isinstance(prompt, list):
        return [_without_empty(turn) if isinstance(turn, dict) else turn for turn in prompt]
    if not isinstance(prompt, str):
        raise SimsdError(f"a prompt must be a string, a chat or token ids, got {text:.80}")
    return prompt


def _without_empty(turn: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in turn.items() if value is not None}


def _json(prompt: Any, row: int | str) -> str:
    def otherwise(value: Any) -> Any:
        if (known := plain(value)) is value:
            raise TypeError(type(value).__name__)
        return known

    try:
        return json.dumps(prompt, default=otherwise)
    except (TypeError, ValueError) as error:
        raise SimsdError(
            f"row {row!r}: a prompt must be a string, a chat or token ids, got {one_line(error)}"
        ) from None


def _named(columns: Iterable[Any]) -> str:
    return ", ".join(map(str, columns)) or "none"
