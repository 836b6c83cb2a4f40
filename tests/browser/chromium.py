"""One headless Chromium for all tests of this process, because starting it and Node takes two seconds of processor
time."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from conftest import skip
from lab.ending import group
from support import PATIENCE

HERE = Path(__file__).parent
#: The headless shell draws the same pages without a browser's windows, each of which takes a second of processor time.
CHROMIUM = shutil.which("chromium-headless-shell") or shutil.which("chromium")
_drivers: list[subprocess.Popen[bytes]] = []  # the last one plays; those before it have ended, or are about to


def need_chromium() -> str:
    """The path of Chromium. Skips the test if there is none."""
    if CHROMIUM is None:
        skip("there is no chromium (Debian: apt-get install chromium-headless-shell)")
    assert CHROMIUM
    return CHROMIUM


def driver() -> subprocess.Popen[bytes]:
    """The process of chromium.mjs. It ends with this process, which closes its input."""
    if not _drivers or _drivers[-1].poll() is not None:
        command = ["node", str(HERE / "chromium.mjs"), need_chromium()]
        _drivers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=group()))
    return _drivers[-1]


async def nothing(asked: dict[str, Any]) -> None:
    raise AssertionError(f"nobody does what the scenario asks for: {asked}")


async def outcome(
    script: str, scenario: str, given: Mapping[str, Any],
    answer: Callable[[dict[str, Any]], Awaitable[Any]] = nothing, patience: float = 2 * PATIENCE,
) -> dict[str, Any]:  # fmt: skip
    """Runs a scenario of a script. Returns what it saw (`seen`) or how it failed (`error`); `answer` handles its
    requests."""
    process = driver()
    assert process.stdin
    assert process.stdout

    def tell(line: Any) -> None:
        assert process.stdin
        process.stdin.write(json.dumps(line).encode() + b"\n")
        process.stdin.flush()

    try:
        async with asyncio.timeout(patience):
            tell({"script": str(HERE / script), "scenario": scenario, "given": given})
            while True:
                line = await asyncio.to_thread(process.stdout.readline)
                assert line, "the driver of Chromium has ended"
                message: dict[str, Any] = json.loads(line)
                if "do" not in message:
                    return message
                tell(await answer(message))
    except BaseException:
        process.kill()  # nobody knows what it still does, so the next scenario has another one
        process.wait()
        raise


async def play(script: str, scenario: str, given: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """Runs a scenario of a script and returns what it saw. An error in it or in its pages (`problems`) fails the
    test."""
    result = await outcome(script, scenario, given, **options)
    assert "error" not in result, f"{result['error']}\n{json.dumps(result['pages'], indent=1)}"
    seen: dict[str, Any] = result["seen"]
    assert seen.pop("problems", []) == []
    return seen
