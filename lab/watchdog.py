"""Run by `lab.ending`: waits for the end of its standard input, then ends a process group and removes folders.

Tells the group's number on a line of standard output. Is told folders on standard input, each followed by a NUL. A
Postgres whose data lies in one of them is shut down first, so that it leaves no shared memory behind.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

PATIENCE = 3.0  # seconds for a Postgres to shut down


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    place = os.fork()
    if place == 0:  # keeps the group in being, and ends with it
        os.setpgid(0, 0)
        for end in range(3):
            os.close(end)
        while True:
            signal.pause()
    with contextlib.suppress(PermissionError):
        os.setpgid(place, place)  # whoever of the two is first
    print(place, flush=True)
    os.close(1)
    folders = [Path(os.fsdecode(name)) for name in sys.stdin.buffer.read().split(b"\0")[:-1]]
    shut_down([int(file.read_text().split()[0]) for folder in folders for file in folder.glob("data/postmaster.pid")])
    os.killpg(place, signal.SIGKILL)
    os.waitpid(place, 0)
    for folder in folders:
        remove(folder)


def shut_down(servers: list[int]) -> None:
    """Ends Postgres servers at once; their own children end with them."""
    until = time.monotonic() + PATIENCE
    for server in servers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server, signal.SIGQUIT)
    while any(map(alive, servers)) and time.monotonic() < until:
        time.sleep(0.02)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def remove(folder: Path) -> None:
    """A process that dies may still write; its folder is removed until it stays away."""
    until = time.monotonic() + PATIENCE
    while folder.exists() and time.monotonic() < until:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
