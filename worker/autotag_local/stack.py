"""Everything that production gets from Supabase and OpenAI, started together on free ports of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psycopg
from psycopg import sql

from autotag.http import serve
from autotag_local.edge import tokens
from autotag_local.edge.app import make_edge
from autotag_local.openai_sim.app import Plan, Simulator
from autotag_local.postgres import LocalPostgres, free_port

WORKER_ROLE = "tagger"
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Member:
    """A user of one workspace and their token."""

    user: str
    workspace: str
    token: str


@dataclass(frozen=True)
class Stack:
    """The addresses and keys of a running stack, named as a Supabase project names them."""

    postgres: LocalPostgres
    database: str
    supabase_url: str
    anon_key: str
    secret_key: str
    jwt_secret: str
    openai_url: str
    openai_key: str
    simulator: Simulator

    def database_url(self, user: str = "postgres") -> str:
        return self.postgres.url(user, self.database)

    def worker_environment(self) -> dict[str, str]:
        """What a worker reads; its login role is nothing but ``autotag_worker``."""
        return {
            "DATABASE_URL": self.database_url(WORKER_ROLE),
            "SUPABASE_URL": self.supabase_url,
            "SUPABASE_SECRET_KEY": self.secret_key,
            "OPENAI_BASE_URL": self.openai_url,
            "OPENAI_API_KEY": self.openai_key,
        }

    def token(self, user: str, lifetime: float = 3600, **claims: Any) -> str:
        """A signed-in user's token."""
        return tokens.sign(self.jwt_secret, "authenticated", subject=user, lifetime=lifetime, **claims)

    def add_member(self, name: str = "workspace", workspace: str | None = None) -> Member:
        """A new user in a new workspace (or in one that is there)."""
        user = str(uuid.uuid4())
        with psycopg.connect(self.database_url(), autocommit=True) as connection:
            connection.execute("insert into auth.users (id, email) values (%s, %s)", (user, f"{user}@example.org"))
            if workspace is None:
                row = connection.execute(
                    "insert into public.workspaces (name) values (%s) returning id::text", (name,)
                ).fetchone()
                assert row is not None
                workspace = str(row[0])
            connection.execute("insert into public.workspace_members values (%s, %s)", (workspace, user))
        return Member(user, workspace, self.token(user))

    def configure(self, **columns: Any) -> None:
        """Changes columns of ``autotag.settings``."""
        assignments = sql.SQL(", ").join(sql.SQL("{} = %s").format(sql.Identifier(name)) for name in columns)
        with psycopg.connect(self.database_url(), autocommit=True) as connection:
            connection.execute(sql.SQL("update autotag.settings set {}").format(assignments), list(columns.values()))


@contextlib.asynccontextmanager
async def local_stack(
    postgres: LocalPostgres, database: str = "postgres", *, plan: Plan | None = None, penalty: float = 0.0
) -> AsyncIterator[Stack]:
    """The edge and the simulator around a database that has autotag's schema."""
    secret = secrets.token_hex(32)
    simulator = Simulator(plan or Plan())
    edge_port, openai_port = free_port(), free_port()
    _make_worker_role(postgres, database)
    with tempfile.TemporaryDirectory(prefix="autotag-files-") as files:
        edge = make_edge(
            postgres.url("authenticator", database), postgres.url("postgres", database), secret, Path(files),
            penalty=penalty,
        )  # fmt: skip
        async with serve(edge, HOST, edge_port), serve(simulator.app(), HOST, openai_port):
            yield Stack(
                postgres=postgres,
                database=database,
                supabase_url=f"http://{HOST}:{edge_port}",
                anon_key=tokens.sign(secret, "anon"),
                secret_key=tokens.sign(secret, "service_role"),
                jwt_secret=secret,
                openai_url=f"http://{HOST}:{openai_port}/v1",
                openai_key=simulator.plan.key,
                simulator=simulator,
            )


def _make_worker_role(postgres: LocalPostgres, database: str) -> None:
    with psycopg.connect(postgres.url(database=database), autocommit=True) as connection:
        name = sql.Identifier(WORKER_ROLE)
        with contextlib.suppress(psycopg.errors.DuplicateObject):
            connection.execute(
                sql.SQL("create role {} login password {} in role autotag_worker").format(
                    name, sql.Literal(postgres.password)
                )
            )


@contextlib.asynccontextmanager
async def worker_process(
    environment: dict[str, str], log: IO[bytes] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A real ``autotag worker``, stopped with SIGTERM at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "autotag", "worker",
        env={"PATH": os.environ.get("PATH", ""), **environment}, stderr=log, stdin=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            await process.wait()
