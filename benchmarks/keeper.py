"""Runs a command for so many seconds at most and ends, with it, everything that it started.

    python keeper.py PARENT SECONDS COMMAND...

It ends them when the time is up, when the command ends, on SIGINT and SIGTERM, and when process PARENT, which started
this one, dies, however that happens. Everything stays in one process group, so that a signal to the group reaches all.
Exit status: the command's, 128 + n where signal n ended it, 124 where time was up. The standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

OUT_OF_TIME = 124
DEATH_SIGNAL, CHILD_SUBREAPER = 1, 36  # prctl(2)
PATIENCE = 10.0  # seconds that a killed process may take to go: a GPU's may have much to give back


class Stopped(Exception):
    """A signal asked for the end."""


def main(parent: int, seconds: float, command: list[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    ask(CHILD_SUBREAPER, 1)  # a process that loses its parent becomes a child of this one, and is found
    ask(DEATH_SIGNAL, signal.SIGTERM)
    try:
        if os.getppid() != parent:  # it died before this could be asked for
            return 128 + signal.SIGTERM
        process = subprocess.Popen(command, preexec_fn=lambda: ask(DEATH_SIGNAL, signal.SIGKILL))
        code = process.wait(timeout=seconds)
        return code if code >= 0 else 128 - code
    except subprocess.TimeoutExpired:
        return OUT_OF_TIME
    except Stopped as stopped:
        return 128 + stopped.args[0]
    except OSError as error:
        print(f"{command[0]} does not start: {error}", flush=True)
        return 127
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        end_descendants()


def stop(number: int, _frame: object) -> None:
    raise Stopped(number)


def ask(option: int, value: int) -> None:
    """prctl(2), where there is one."""
    try:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
    except (OSError, AttributeError):
        pass


def descendants(pid: int) -> list[int]:
    """Every process below `pid` that runs, from /proc."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue
        if state not in "ZX":
            children.setdefault(int(parent), []).append(int(name))
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def end_descendants() -> None:
    deadline = time.monotonic() + PATIENCE
    while (found := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        reap()
        time.sleep(0.01)


def reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
