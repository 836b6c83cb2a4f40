"""The local stack of the Supabase CLI (`supabase start`): where it is and its keys."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psycopg

NEEDED = ("API_URL", "DB_URL", "ANON_KEY", "SERVICE_ROLE_KEY", "JWT_SECRET")
ROOT = Path(__file__).parent.parent
STATUS_TIMEOUT = 60  # seconds


class ProjectError(Exception):
    """There is no stack to use; the message says what to do."""


def project_variables() -> Mapping[str, str]:
    """What ``supabase status -o env`` prints, or the same variables where the environment has them already.

    Raises:
        ProjectError: the stack does not run, a variable is missing, or autotag is not in its database.
    """
    variables: Mapping[str, str] = os.environ if "API_URL" in os.environ else _ask_the_cli()
    missing = [name for name in NEEDED if not variables.get(name)]
    if missing:
        raise ProjectError(f"{', '.join(missing)} is missing in what supabase status -o env prints.")
    try:
        with psycopg.connect(variables["DB_URL"], connect_timeout=10) as connection:
            connection.execute("select autotag.schema_version()")
    except psycopg.OperationalError as error:
        raise ProjectError(f"The stack's database does not answer: {str(error).strip().splitlines()[0]}") from None
    except psycopg.ProgrammingError:
        raise ProjectError("autotag is not in the stack's database yet: run supabase migration up.") from None
    return variables


def _ask_the_cli() -> dict[str, str]:
    own = ROOT / "node_modules" / ".bin" / "supabase"
    binary = str(own) if own.exists() else shutil.which("supabase")
    if binary is None:
        raise ProjectError("The Supabase CLI is not installed: run scripts/setup, then supabase start.")
    done = subprocess.run(
        [binary, "status", "-o", "env", "--workdir", str(ROOT)],
        capture_output=True, text=True, check=False, timeout=STATUS_TIMEOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode != 0:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise ProjectError(f"There is no local stack ({reason[-1] if reason else 'no answer'}): run supabase start.")
    return parse_env(done.stdout)


def parse_env(text: str) -> dict[str, str]:
    """The variables in lines of ``NAME="value"``."""
    return {match[1]: match[2] for match in re.finditer(r'^([A-Z_]+)="?(.*?)"?$', text, re.MULTILINE)}
