"""Commands as processes of their own, forked from one that has imported everything: that takes 0.9 s of processor time.

What is forked is a command like any other: it has its own environment, output and exit code. That `python -m autotag`
starts at all, other tests see (`test_wheel`, `test_a_worker_that_does_not_fit_says_what_to_do` …).
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from unittest import mock

from autotag.__main__ import load
from lab.machine import read_authorities_once

COMMAND = load()
read_authorities_once()


@cache
def context() -> ForkServerContext:
    """A server of forks, for the rest of the session. Libraries also read the environment when they are imported."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["pytest", "forked"])
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parent)}
    with mock.patch.dict(os.environ, environment, clear=True):
        forkserver.ensure_running()
    return forks


async def run_command(*arguments: str, environment: Mapping[str, str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `autotag` with these arguments, without a terminal, with nothing else in its environment."""
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as error:
        process = context().Process(target=become, args=(arguments, dict(environment), out.name, error.name))
        process.start()
        await asyncio.to_thread(process.join)
        return process.exitcode or 0, out.read().decode(), error.read().decode()


@contextlib.asynccontextmanager
async def worker_process(environment: Mapping[str, str]) -> AsyncIterator[ForkServerProcess]:
    """A process of `autotag worker`, stopped with SIGTERM at the end; what it has logged is printed then."""
    with tempfile.NamedTemporaryFile() as log:
        own = {"PATH": os.environ["PATH"], **environment}
        process = context().Process(target=become, args=(("worker",), own, log.name, log.name))
        process.start()
        try:
            yield process
        finally:
            process.terminate()
            await asyncio.to_thread(process.join)
            print(log.read().decode())


def become(arguments: tuple[str, ...], environment: dict[str, str], *outputs: str) -> None:
    """The forked process becomes the command."""
    for number, name in enumerate(outputs, 1):
        place = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(place, number)
        os.close(place)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["autotag", *arguments]
    COMMAND()
