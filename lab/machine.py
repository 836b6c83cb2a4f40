"""Memory and processor time of processes, read from Linux's /proc, and a way to reduce both."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Literal

import certifi

from lab.postgres import LocalPostgres

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def memory(pid: int, field_name: Literal["VmRSS", "VmHWM"]) -> float:
    """Megabytes of memory of a process: VmRSS (now) or VmHWM (peak).

    Raises:
        LookupError: the process has ended.
        FileNotFoundError: there is no such process.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field_name):
            return int(line.split()[1]) / 1024
    raise LookupError(field_name)


def processor_seconds(pids: Iterable[int]) -> float:
    """Seconds of processor time that these processes and their ended children have used."""
    total = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(int(field) for field in fields[11:15])
    return total / TICKS_PER_SECOND


def processor_time() -> tuple[int, int]:
    """Ticks since the machine's start: the used ones (including those of other guests of the host), and all."""
    with Path("/proc/stat").open() as stat:
        user, nice, system, idle, waiting, *others = (int(field) for field in stat.readline().split()[1:9])
    used = user + nice + system + sum(others)
    return used, used + idle + waiting


def server_processes(server: LocalPostgres) -> list[int]:
    """Ids of the postmaster and its running child processes."""
    master = int((server.data / "postmaster.pid").read_text().split()[0])
    return [master, *(int(p) for p in Path(f"/proc/{master}/task/{master}/children").read_text().split())]


def read_authorities_once() -> None:
    """Makes the HTTP clients of this process share the 150 certificate authorities. Otherwise each client would read
    them, which takes 25 ms, and a worker has six clients."""
    ssl.create_default_context = cache(ssl.create_default_context)  # type: ignore[assignment]
    ssl.create_default_context(cafile=certifi.where())
