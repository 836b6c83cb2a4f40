"""What processes of this machine use, as Linux tells it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from lab.postgres import LocalPostgres

TICKS = os.sysconf("SC_CLK_TCK")  # of processor time in a second


def memory(pid: int, which: Literal["VmRSS", "VmHWM"]) -> float:
    """Megabytes of a process: VmRSS (now) or VmHWM (at most so far).

    Raises:
        LookupError: the process has ended.
        FileNotFoundError: there is no such process.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) / 1024
    raise LookupError(which)


def processor_seconds(pids: Iterable[int]) -> float:
    """Seconds of processor time that these processes (and their children that have ended) have used."""
    total = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(int(field) for field in fields[11:15])
    return total / TICKS


def server_processes(server: LocalPostgres) -> list[int]:
    """The postmaster, and every process of it that lives."""
    master = int((server.data / "postmaster.pid").read_text().split()[0])
    return [master, *(int(p) for p in Path(f"/proc/{master}/task/{master}/children").read_text().split())]
