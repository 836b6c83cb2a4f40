"""Run by `lab.ending`: waits until its standard input closes, then kills a process group and removes folders.

Prints the group's id to standard output. Reads folders from standard input, each terminated by a NUL. If a folder has
the data of a Postgres server, that server is shut down first, so that it leaves no shared memory behind.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

SHUTDOWN_TIMEOUT = 3.0  # seconds for a Postgres to shut down


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    group = os.fork()
    if group == 0:  # the child only keeps the group alive, and is killed with it
        os.setpgid(0, 0)
        for descriptor in range(3):
            os.close(descriptor)
        while True:
            signal.pause()
    with contextlib.suppress(PermissionError):
        os.setpgid(group, group)  # parent and child both set it, whichever runs first
    print(group, flush=True)
    os.close(1)
    folders = [Path(os.fsdecode(name)) for name in sys.stdin.buffer.read().split(b"\0")[:-1]]
    shut_down([int(file.read_text().split()[0]) for folder in folders for file in folder.glob("data/postmaster.pid")])
    os.killpg(group, signal.SIGKILL)
    os.waitpid(group, 0)
    for folder in folders:
        remove(folder)


def shut_down(servers: list[int]) -> None:
    """Shuts Postgres servers down immediately; their child processes end with them."""
    deadline = time.monotonic() + SHUTDOWN_TIMEOUT
    for server in servers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server, signal.SIGQUIT)
    while any(map(alive, servers)) and time.monotonic() < deadline:
        time.sleep(0.02)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def remove(folder: Path) -> None:
    """Removes a folder. Repeats this while the folder reappears, because a process that is ending may still write."""
    deadline = time.monotonic() + SHUTDOWN_TIMEOUT
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
