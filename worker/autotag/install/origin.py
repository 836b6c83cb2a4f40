"""Finds the hosts at which a project serves its Storage."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from psycopg.conninfo import conninfo_to_dict

from autotag.install.answers import HostError

REF = re.compile(r"[a-z0-9]{16,24}")
LOCAL_PORT = "54322"  # of the database of `supabase start`
ENVIRONMENT = ("AUTOTAG_SUPABASE_URL", "SUPABASE_URL")  # names the project's URL, if no option does
LOCAL_HOSTS = ("127.0.0.1:54321", "localhost:54321")


def storage_hosts(
    database_url: str, project_url: str | None, folder: Path | None, *, environment: bool = True
) -> tuple[str, ...]:
    """The hosts of a project's own API, from its URL, the project that its folder is linked to, and its database.

    Args:
        database_url: connection URL of the database's owner.
        project_url: such as ``https://<ref>.supabase.co``; None: not given.
        folder: the project's migrations; None: there is no folder.
        environment: if no URL is given, read it from the environment.

    Raises:
        HostError: ``project_url`` is not the URL of an API.
    """
    named = project_url or (_in_environment()[1] if environment else "")
    hosts = [host_of(named)] if named else []
    linked = folder.parent / ".temp" / "project-ref" if folder else None
    refs = [linked.read_text("utf-8").strip()] if linked and linked.is_file() else []
    server = conninfo_to_dict(database_url)
    name, user = str(server.get("host") or ""), str(server.get("user") or "")
    if match := re.fullmatch(r"db\.(\w+)\.supabase\.co", name):
        refs.append(match[1])
    if name.endswith(".pooler.supabase.com"):
        refs.append(user.rpartition(".")[2])
    hosts += [f"{ref}.supabase.co" for ref in refs if REF.fullmatch(ref)]
    if _is_local(server):
        hosts += LOCAL_HOSTS
    return tuple(dict.fromkeys(hosts))


def note_on_environment(answers: Mapping[str, Any] | None) -> tuple[str, ...]:
    """A note if the environment names a host that the adapter does not know. Only an option changes the adapter,
    because the environment may belong to another project.

    Args:
        answers: the answers that the adapter records; None: there is no adapter yet.
    """
    name, named = _in_environment()
    if answers is None or not named:
        return ()
    try:
        if host_of(named) in answers["storage_hosts"]:
            return ()
    except HostError:  # a wrong value there is not an error of this command
        return ()
    return (
        f"{name} is {named}, and the adapter does not read URLs of that host as files;"
        f" autotag init --project-url {named} adds it.",
    )


def _in_environment() -> tuple[str, str]:
    """The variable with the project's URL, and the URL; two empty strings: it is not set."""
    return next(((name, value) for name in ENVIRONMENT if (value := os.environ.get(name))), ("", ""))


def push_command(database_url: str) -> str:
    """The command of the Supabase CLI that applies the migrations to a database: without --remote, to the local stack.

    Args:
        database_url: connection URL of the database's owner.
    """
    server = conninfo_to_dict(database_url)
    if _is_local(server):
        return "supabase db push"
    hosted = str(server.get("host") or "").endswith((".supabase.co", ".pooler.supabase.com"))
    return "supabase db push --remote" if hosted else 'supabase db push --remote="$DATABASE_URL"'


def _is_local(server: Mapping[str, object]) -> bool:
    """Whether this is the database of ``supabase start``."""
    return server.get("host") in ("127.0.0.1", "localhost") and str(server.get("port")) == LOCAL_PORT


def host_of(url: str) -> str:
    """The host of a project's URL.

    Raises:
        HostError: it is not the URL of an API.
    """
    parts = urlsplit(url.strip())
    host = (parts.netloc.rpartition("@")[2]).lower().removesuffix(":443")
    if parts.scheme not in ("http", "https") or not re.fullmatch(r"[a-z0-9.-]+(:\d+)?|\[[0-9a-f:]+\](:\d+)?", host):
        raise HostError(
            f"{url!r} is not the URL of a project (--project-url); write for example https://<ref>.supabase.co."
        )
    return host
