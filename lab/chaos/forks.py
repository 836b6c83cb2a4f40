"""Workers that are forked from a process which has imported everything: ``python -m lab.chaos.forks``.

A worker that is killed a second after its start spends most of its time with imports. The fork server imports once and
forks a process for each worker. A forked worker is like any other: it has its own process, environment and connections.

The server reads orders from its standard input, one JSON object a line, and writes what happens to its standard
output: ``{"order": 1, "pid": 42}`` when the worker of an order has begun, ``{"pid": 42, "code": -9}`` when it has ended
(its exit code, or minus the number of the signal that ended it). The server ends when its standard input closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import selectors
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from lab.ending import group
from lab.machine import read_authorities_once

# -- the client's side


@dataclass
class Forked:
    """A worker's process, as far as `asyncio.subprocess.Process` is needed."""

    pid: int
    returncode: int | None = None
    _ended: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    async def wait(self) -> int:
        """Its exit code, or the negative number of the signal that ended it."""
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends it a signal, if it has not ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)

    def end(self, code: int) -> None:
        """Notes the worker's end, as the server has reported it."""
        self.returncode = code
        self._ended.set()


class Forks:
    """A running fork server, and the workers that it has forked."""

    def __init__(self, server: asyncio.subprocess.Process) -> None:
        self._server = server
        self._orders = itertools.count(1)
        self._ordered: dict[int, asyncio.Future[Forked]] = {}
        self._living: dict[int, Forked] = {}

    async def start(self, environment: Mapping[str, str], log: Path, point: str | None = None) -> Forked:
        """A worker with this environment whose output is appended to a file.

        Args:
            environment: its complete environment.
            log: the file for its standard output and error.
            point: where it kills itself (`lab.chaos.doomed`); None: never.

        Raises:
            RuntimeError: the server has ended.
        """
        number = next(self._orders)
        begun: asyncio.Future[Forked] = asyncio.get_running_loop().create_future()
        self._ordered[number] = begun
        order = {"order": number, "environment": dict(environment), "log": str(log), "point": point}
        assert self._server.stdin
        self._server.stdin.write(json.dumps(order).encode() + b"\n")
        return await begun

    async def listen(self) -> None:
        """Reads the server's messages until it ends."""
        assert self._server.stdout
        async for line in self._server.stdout:
            message = json.loads(line)
            if "order" in message:
                worker = self._living[message["pid"]] = Forked(message["pid"])
                begun = self._ordered.pop(message["order"])
                if begun.cancelled():  # its caller was cancelled
                    worker.kill()
                else:
                    begun.set_result(worker)
            else:
                self._living.pop(message["pid"]).end(message["code"])
        for worker in self._living.values():
            worker.end(-signal.SIGKILL)
        for begun in self._ordered.values():
            begun.set_exception(RuntimeError("The fork server has ended."))


@contextlib.asynccontextmanager
async def fork_server() -> AsyncIterator[Forks]:
    """A server for as long as the context is open. At the end, workers that are still running are killed."""
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "lab.chaos.forks", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        process_group=group(),
    )  # fmt: skip
    forks = Forks(server)
    hearing = asyncio.create_task(forks.listen())
    try:
        yield forks
    finally:
        assert server.stdin
        server.stdin.close()
        await server.wait()
        await hearing


# -- the server's side


def serve() -> None:
    """Forks workers on order until its input closes; then kills those that are still running."""
    run = prepare()
    living: set[int] = set()
    ended, noted = os.pipe()
    os.set_blocking(noted, False)
    signal.signal(signal.SIGCHLD, lambda _, __: None)
    signal.set_wakeup_fd(noted)
    with selectors.DefaultSelector() as ready:
        ready.register(sys.stdin.buffer, selectors.EVENT_READ)
        ready.register(ended, selectors.EVENT_READ)
        pending = b""
        while True:
            for key, _ in ready.select():
                if key.fileobj == ended:
                    os.read(ended, 1000)
                    reap(living)
                    continue
                heard = os.read(sys.stdin.fileno(), 1_000_000)
                if not heard:
                    for pid in living:
                        os.kill(pid, signal.SIGKILL)
                    return
                *orders, pending = (pending + heard).split(b"\n")
                for order in map(json.loads, orders):
                    pid = os.fork()
                    if pid == 0:
                        become(run, order)
                    living.add(pid)
                    tell({"order": order["order"], "pid": pid})


def prepare() -> Callable[[list[str]], Any]:
    """Imports everything that a worker imports, including what its libraries import at their first use."""
    from autotag.__main__ import load

    run = load()
    import anyio._backends._asyncio
    from PIL import Image

    import lab.chaos.doomed

    assert anyio._backends._asyncio
    assert lab.chaos.doomed
    Image.init()
    read_authorities_once()
    return run


def reap(living: set[int]) -> None:
    """Reports all workers that have ended."""
    while living:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        living.remove(pid)
        tell({"pid": pid, "code": os.waitstatus_to_exitcode(status)})


def tell(what: dict[str, Any]) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def become(run: Callable[[list[str]], Any], order: dict[str, Any]) -> NoReturn:
    """The forked process becomes the worker, and ends with it."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with Path(order["log"]).open("ab") as log, Path(os.devnull).open("rb") as nothing:
            for number, place in enumerate((nothing, log, log)):
                os.dup2(place.fileno(), number)
        os.environ.clear()
        os.environ.update(order["environment"])
        if order["point"]:
            from lab.chaos.doomed import doom

            doom(order["point"])
        run(["worker"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does at the end of a process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
