"""The real Supabase CLI, run as a user runs it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

BINARY = Path(__file__).parent.parent / "node_modules" / ".bin" / "supabase"


def supabase(*arguments: str, stdout_only: bool = False) -> str:
    """Runs the CLI; what it printed.

    Raises:
        AssertionError: it ended with an error.
    """
    done = subprocess.run(
        [str(BINARY), *arguments], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/tmp"), "SUPABASE_TELEMETRY_DISABLED": "1",
             "PGSSLMODE": "disable"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout if stdout_only else done.stdout + done.stderr
