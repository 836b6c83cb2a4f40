"""What Deno itself finds in the edge functions: nothing."""

from __future__ import annotations

import subprocess

import pytest
from deno import DENO, FUNCTIONS


@pytest.mark.parametrize(
    "command",
    [["fmt", "--check"], ["lint"], ["check", "--node-modules-dir=manual", "--frozen", "index.ts"]],
    ids=lambda c: c[0],
)
@pytest.mark.parametrize("function", ["openai-webhook", "auto_tag_asset"])
def test_deno_finds_nothing(function: str, command: list[str]) -> None:
    done = subprocess.run([DENO, *command], cwd=FUNCTIONS / function, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
