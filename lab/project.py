"""Finds the addresses and keys of the Supabase CLI's local stack (`supabase start`)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psycopg

REQUIRED = ("API_URL", "DB_URL", "ANON_KEY", "SERVICE_ROLE_KEY", "JWT_SECRET")
ROOT = Path(__file__).parent.parent
STATUS_TIMEOUT = 60  # seconds


class ProjectError(Exception):
    """No stack is available; the message says what to do."""


def project_variables() -> Mapping[str, str]:
    """The variables that ``supabase status -o env`` prints, or the environment if it already has them.

    Raises:
        ProjectError: the stack is not running, a variable is missing, or its database does not have autotag.
    """
    variables: Mapping[str, str] = os.environ if "API_URL" in os.environ else _read_cli_status()
    missing = [name for name in REQUIRED if not variables.get(name)]
    if missing:
        raise ProjectError(f"The output of 'supabase status -o env' is incomplete: {', '.join(missing)} is missing.")
    try:
        with psycopg.connect(variables["DB_URL"], connect_timeout=10) as connection:
            connection.execute("select autotag.schema_version()")
    except psycopg.OperationalError as error:
        reason = str(error).strip().splitlines()[0]
        raise ProjectError(f"Cannot connect to the stack's database: {reason}") from None
    except psycopg.ProgrammingError:
        raise ProjectError("The stack's database does not have autotag yet. Run 'supabase migration up'.") from None
    return variables


def _read_cli_status() -> dict[str, str]:
    project_binary = ROOT / "node_modules" / ".bin" / "supabase"
    binary = str(project_binary) if project_binary.exists() else shutil.which("supabase")
    if binary is None:
        raise ProjectError("The Supabase CLI is not installed. Run 'scripts/setup', then 'supabase start'.")
    done = subprocess.run(
        [binary, "status", "-o", "env", "--workdir", str(ROOT)],
        capture_output=True, text=True, check=False, timeout=STATUS_TIMEOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        reason = lines[-1] if lines else "no output"
        raise ProjectError(f"No local stack is running ({reason}). Run 'supabase start'.")
    return parse_env(done.stdout)


def parse_env(text: str) -> dict[str, str]:
    """Parses lines of ``NAME="value"``."""
    return {match[1]: match[2] for match in re.finditer(r'^([A-Z_]+)="?(.*?)"?$', text, re.MULTILINE)}
