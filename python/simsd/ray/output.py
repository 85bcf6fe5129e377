"""The folder of a job's results: parts, each written in one go, and a manifest of what they are results of."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from simsd.errors import SimsdError, one_line
from simsd.models import adapters, folders

# Readers of a folder of Parquet files skip names that begin so.
MANIFEST, LOCK = "_manifest.json", "_lock"
WEIGHTS = "*.safetensors"
SAMPLE = 1 << 16  # bytes of a weight file's begin, middle and end that tell it from others


class Output:
    """Opens the folder, makes it where it is not there, and keeps others from writing until `close`.

    Raises:
        SimsdError: it cannot be written, holds something else, or another job writes there.
    """

    def __init__(self, folder: str | Path) -> None:
        if "://" in str(folder):
            raise SimsdError(f"output must be a folder of this machine, got {folder}: copy it there afterwards")
        self.folder = Path(folder).expanduser().absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            foreign = [f.name for f in self.folder.iterdir() if f.name not in (MANIFEST, LOCK) and not _is_ours(f)]
            if foreign and not (self.folder / MANIFEST).exists():
                raise SimsdError(f"output {self.folder} holds other files ({foreign[0]}): name a new or empty folder")
            self._lock = (self.folder / LOCK).open("w")
        except OSError as error:
            raise SimsdError(f"output {self.folder} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise SimsdError(f"another job writes to {self.folder}: wait for its end, or name another output") from None
        for unfinished in self.folder.glob(".part-*"):
            unfinished.unlink()
        highest = max((int(part.stem.removeprefix("part-")) for part in self._parts()), default=-1)
        self._numbers = itertools.count(highest + 1)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._lock.close()

    def manifest(self) -> dict[str, Any] | None:
        """What the parts are results of; None: there are none."""
        file = self.folder / MANIFEST
        try:
            return json.loads(file.read_text()) if file.exists() else None
        except (OSError, ValueError) as error:
            raise SimsdError(f"{file} cannot be read ({one_line(error)}): name another output") from error

    def claim(self, manifest: dict[str, Any]) -> None:
        """Writes the manifest or, where there are parts, raises SimsdError unless theirs is the same."""
        manifest, before = json.loads(json.dumps(manifest)), self.manifest()
        if before is None or not self._parts():
            self._write(MANIFEST, lambda file: file.write_text(json.dumps(manifest, indent=1) + "\n"))
            return
        for name in dict.fromkeys([*manifest, *before]):
            if before.get(name) != manifest.get(name):
                raise SimsdError(
                    f"output {self.folder} is of a job with {name} {_shown(before.get(name))}, and this one has"
                    f" {_shown(manifest.get(name))}: name another output"
                )

    def done(self) -> tuple[pa.ChunkedArray | None, int]:
        """The ids of all parts (None: there are none), and how many of these rows failed."""
        tables = []
        for part in self._parts():
            try:
                tables.append(pq.read_table(part, columns=["id", "error"]))
            except (pa.ArrowException, OSError) as error:
                raise SimsdError(
                    f"{part} cannot be read ({one_line(error)}): remove it, and its rows are done again"
                ) from error
        if not tables:
            return None, 0
        whole = pa.concat_tables(tables)
        return whole["id"], whole.num_rows - whole["error"].null_count

    def add(self, part: pa.Table) -> None:
        """Writes a part, which is there as a whole or not at all."""
        self._write(f"part-{next(self._numbers):06d}.parquet", lambda file: pq.write_table(part, file))

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-" + "[0-9]" * 6 + ".parquet"))

    def _write(self, name: str, write: Any) -> None:
        unfinished = self.folder / f".{name}"
        try:
            write(unfinished)
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            unfinished.replace(self.folder / name)
        except OSError as error:
            raise SimsdError(f"{self.folder / name} cannot be written: {error.strerror or one_line(error)}") from error


def fingerprint(model: str) -> str:
    """Tells a checkpoint from others: of its configuration and, of each weight file, its size and some bytes; an
    adapter by its model's, too."""
    digest, found = hashlib.blake2b(digest_size=8), [folders.find(model)]
    if adapters.is_adapter(found[0]):
        found.append(adapters.find_base(found[0]))
    for config in (folder / name for folder in found for name in ("config.json", adapters.CONFIG)):
        digest.update(config.read_bytes() if config.exists() else b"")
    for path in (path for folder in found for path in sorted(folder.glob(WEIGHTS))):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for begin in (0, size // 2, max(size - SAMPLE, 0)):
                file.seek(begin)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def _is_ours(file: Path) -> bool:
    return file.name.startswith((".part-", f".{MANIFEST}", "part-"))


def _shown(value: Any) -> str:
    return "no value" if value is None else json.dumps(value)
