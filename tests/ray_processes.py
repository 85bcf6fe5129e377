"""Processes of a Ray cluster that this process has started, by what Ray calls them."""

from __future__ import annotations

import os
from pathlib import Path


def ray_workers(name: str) -> list[int]:
    """The pids of actors in whose name is `name`, of descendants of this process."""
    parents, titles = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
            except (OSError, IndexError):
                continue  # gone meanwhile

    def is_ours(pid: int) -> bool:
        while pid > 1 and pid != os.getpid():
            pid = parents.get(pid, 0)
        return pid == os.getpid()

    return sorted(pid for pid, title in titles.items() if title.startswith("ray::") and name in title and is_ours(pid))
