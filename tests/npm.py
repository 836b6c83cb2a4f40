"""The npm package, built."""

from __future__ import annotations

import fcntl
import subprocess
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "clients" / "js"
BIN = ROOT / "node_modules" / ".bin"


def built_package() -> Path:
    """The package's folder `dist`, as npm publishes it. It is built once after each change of the source."""
    dist = PACKAGE / "dist"
    sources = [PACKAGE / "tsconfig.json", *(PACKAGE / "src").rglob("*.ts")]
    with (PACKAGE / "tsconfig.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes run tests
        stamp = ROOT / "node_modules" / ".autotag-built"
        if not (stamp.exists() and dist.exists()) or stamp.stat().st_mtime < max(
            path.stat().st_mtime for path in sources
        ):
            subprocess.run([BIN / "tsc", "-p", PACKAGE / "tsconfig.json"], check=True)
            stamp.touch()
    return dist
