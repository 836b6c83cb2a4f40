"""The demo leaves nothing behind, however it ends: no process, no folder."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT

START = 120.0  # seconds at most until the demo serves
END = 60.0  # seconds at most from the signal to the end of the last process, also on a busy machine


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder for temporary folders that Postgres may enter, whatever login it runs as."""
    place = Path(tempfile.mkdtemp(prefix="demo-ends-", dir="/tmp"))
    place.chmod(0o711)
    yield place
    shutil.rmtree(place)


def processes() -> dict[int, tuple[int, str]]:
    """The parent and the command of every process that is not a zombie."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,stat=,command="], check=True, capture_output=True, text=True
    ).stdout
    entries = (line.split(None, 3) for line in listed.splitlines())
    return {int(pid): (int(parent), command) for pid, parent, state, command in entries if not state.startswith("Z")}


def family(root: int) -> dict[int, str]:
    """All processes that a process has started, directly or not."""
    listed = processes()
    members = {root}
    while grown := {pid for pid, (parent, _) in listed.items() if parent in members} - members:
        members |= grown
    return {pid: listed[pid][1] for pid in members}


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGHUP, 0),  # serving has ended as it was told to
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)  # fmt: skip
async def test_nothing_outlives_the_demo(place: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    shutil.copy(next((ROOT / "supabase" / "seed" / "assets").rglob("*.png")), tmp_path)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "lab.demo", "--serve", "--images", str(tmp_path),
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/tmp"), "TMPDIR": str(place)},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, start_new_session=True,
        preexec_fn=heed,
    )  # fmt: skip
    assert process.stdout
    assert process.stderr
    try:
        async with asyncio.timeout(START):
            while b"Everything keeps running" not in (line := await process.stdout.readline()):
                assert line, (await process.stderr.read()).decode()
        members = family(process.pid)
        commands = "\n".join(members.values())
        assert "postgres" in commands
        assert "autotag worker" in commands
        assert any(name.startswith("autotag-pg-") for name in os.listdir(place))
        process.send_signal(number)
        # The demo, its worker and its watchdog hold this pipe; it closes when the last of them has gone.
        async with asyncio.timeout(END):
            said = await process.stderr.read()
            assert await process.wait() == code, said.decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    patience = time.monotonic() + END
    while left := {pid: command for pid, (_, command) in processes().items() if pid in members}:
        assert time.monotonic() < patience, left  # Postgres's own processes notice within moments that theirs has gone
        await asyncio.sleep(0.05)
    assert os.listdir(place) == []


def heed() -> None:
    """Restores the signals that nohup or a shell's background may have disabled for the tests."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
