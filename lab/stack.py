"""Starts local replacements of Supabase and OpenAI on free ports of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import psycopg
from psycopg import sql
from storage3 import AsyncStorageClient

from autotag.http.serve import serve
from autotag.openai.provider import fingerprint
from lab.edge import tokens
from lab.edge.app import make_edge
from lab.edge.manners import Manners
from lab.ending import group, temporary_folder
from lab.openai_sim.app import Plan, Simulator
from lab.postgres import LocalPostgres, free_port

WORKER_ROLE = "tagger"
OPERATOR_ROLE = "overseer"
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Member:
    """A user of one workspace and the user's token."""

    user: str
    workspace: str
    token: str


def connect_anew(url: str) -> AbstractContextManager[psycopg.Connection[Any]]:
    """A new connection in autocommit mode, which is closed at the end."""
    return psycopg.connect(url, autocommit=True)


@dataclass(frozen=True)
class Stack:
    """The addresses and keys of a running stack, with a Supabase project's names."""

    owner_url: str  # of the database, as ``postgres``
    supabase_url: str
    anon_key: str
    secret_key: str
    jwt_secret: str
    openai_url: str
    openai_key: str
    simulator: Simulator
    files: Path | None = None  # the local edge's folder
    manners: Manners = field(default_factory=Manners)  # how the local edge behaves
    connect: Callable[[str], AbstractContextManager[psycopg.Connection[Any]]] = connect_anew

    def database_url(self, user: str = "postgres") -> str:
        """The database as a different role; in this stack every role has the owner's password."""
        return as_role(self.owner_url, user)

    def worker_environment(self) -> dict[str, str]:
        """A worker's environment. Its login is a member of ``autotag_worker`` only."""
        return {
            "DATABASE_URL": self.database_url(WORKER_ROLE),
            "SUPABASE_URL": self.supabase_url,
            "SUPABASE_SECRET_KEY": self.secret_key,
            "OPENAI_BASE_URL": self.openai_url,
            "OPENAI_API_KEY": self.openai_key,
        }

    def operator_environment(self) -> dict[str, str]:
        """The environment for an operator's commands. Their login is a member of ``autotag_operator`` only."""
        return {**self.worker_environment(), "DATABASE_URL": self.database_url(OPERATOR_ROLE)}

    def token(self, user: str, lifetime: float = 3600, **claims: Any) -> str:
        """A token for a signed-in user."""
        return tokens.sign(self.jwt_secret, "authenticated", subject=user, lifetime=lifetime, **claims)

    def storage(self) -> AsyncStorageClient:
        """A Storage client with the secret key."""
        headers = {"apikey": self.secret_key, "Authorization": f"Bearer {self.secret_key}"}
        return AsyncStorageClient(f"{self.supabase_url}/storage/v1/", headers)

    def add_member(self, name: str = "workspace", workspace: str | None = None) -> Member:
        """A new user in an existing workspace (``workspace``) or a new one."""
        user = str(uuid.uuid4())
        with self.connect(self.database_url()) as connection:
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
        """Updates columns of ``autotag.settings``."""
        assignments = sql.SQL(", ").join(sql.SQL("{} = %s").format(sql.Identifier(name)) for name in columns)
        with self.connect(self.database_url()) as connection:
            connection.execute(sql.SQL("update autotag.settings set {}").format(assignments), list(columns.values()))

    def prove(self) -> None:
        """Marks this provider as proven, so that autotag sends no probe first."""
        with self.connect(self.database_url()) as connection:
            connection.execute(
                "update autotag.provider_limits set base_url = %s, fingerprint = %s, proven_at = now()",
                (self.openai_url, fingerprint(self.openai_key, self.openai_url)),
            )

    def compress(self, speed: float) -> None:
        """Speeds up autotag's clock by a factor for new connections. A lease still lasts 60 seconds of real time."""
        with psycopg.connect(self.database_url("supabase_admin"), autocommit=True) as connection:
            name = sql.Identifier(connection.info.dbname)
            connection.execute(
                sql.SQL("alter database {} set autotag.speed = {}").format(name, sql.Literal(str(speed)))
            )
        anew = replace(self, connect=connect_anew)  # existing connections do not have the new clock
        anew.configure(test_clock=True, lease=f"{60 * speed} s")

    @contextlib.contextmanager
    def configured(self, **columns: Any) -> Iterator[None]:
        """Updates columns of ``autotag.settings`` while the context is open."""
        names = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(name)) for name in columns)
        with self.connect(self.database_url()) as connection:
            before = connection.execute(sql.SQL("select {} from autotag.settings").format(names)).fetchone()
        self.configure(**columns)
        try:
            yield
        finally:
            self.configure(**dict(zip(columns, before or (), strict=True)))


def as_role(url: str, role: str) -> str:
    """A database URL for a different role with the same password."""
    parts = urlsplit(url)
    return parts._replace(netloc=f"{role}:{parts.password}@{parts.hostname}:{parts.port}").geturl()


@contextlib.asynccontextmanager
async def local_stack(
    postgres: LocalPostgres, database: str = "postgres", *, plan: Plan | None = None, penalty: float = 0.0
) -> AsyncIterator[Stack]:
    """The edge and the simulator for a database with autotag's schema, and logins for workers and operators."""
    make_worker_role(postgres.url(database=database))
    async with edge_stack(postgres, database, plan=plan, penalty=penalty) as stack:
        yield stack


@contextlib.asynccontextmanager
async def edge_stack(
    postgres: LocalPostgres, database: str, *, plan: Plan | None = None, penalty: float = 0.0
) -> AsyncIterator[Stack]:
    """The edge and the simulator for a database with a Supabase project's baseline, with or without autotag.

    Args:
        postgres: the server.
        database: its database.
        plan: how the simulator behaves.
        penalty: share of the real Realtime's delays before it refuses, 0 to 1.
    """
    secret, port, manners = secrets.token_hex(32), free_port(), Manners(penalty=penalty)
    with temporary_folder("autotag-files-") as files:
        edge = make_edge(
            postgres.url("authenticator", database), postgres.url("postgres", database), secret, files,
            manners,
        )  # fmt: skip
        async with serve(edge, HOST, port):
            project = {
                "API_URL": f"http://{HOST}:{port}", "DB_URL": postgres.url("postgres", database), "JWT_SECRET": secret,
                "ANON_KEY": tokens.sign(secret, "anon"), "SERVICE_ROLE_KEY": tokens.sign(secret, "service_role"),
            }  # fmt: skip
            async with project_stack(project, plan=plan) as stack:
                yield replace(stack, files=files, manners=manners)


@contextlib.asynccontextmanager
async def supabase_stack(project: Mapping[str, str], *, plan: Plan | None = None) -> AsyncIterator[Stack]:
    """The stack of `supabase start` (or a compatible one) with autotag's schema, and the simulator.

    Args:
        project: the variables of ``supabase status -o env``.
        plan: how the simulator behaves.

    Raises:
        KeyError: a variable is missing; the key is its name.
    """
    async with project_stack(project, plan=plan) as stack:
        make_worker_role(stack.owner_url)
        yield stack


@contextlib.asynccontextmanager
async def project_stack(project: Mapping[str, str], *, plan: Plan | None) -> AsyncIterator[Stack]:
    """A Supabase project's addresses and the simulator."""
    simulator, port = Simulator(plan or Plan()), free_port()
    async with serve(simulator.app(), HOST, port):
        yield Stack(
            owner_url=project["DB_URL"],
            supabase_url=project["API_URL"].rstrip("/"),
            anon_key=project["ANON_KEY"],
            secret_key=project["SERVICE_ROLE_KEY"],
            jwt_secret=project["JWT_SECRET"],
            openai_url=f"http://{HOST}:{port}/v1",
            openai_key=simulator.plan.key,
            simulator=simulator,
        )


def make_worker_role(owner_url: str) -> None:
    """Creates a login with only the worker's rights and one with only the operator's."""
    password = sql.Literal(urlsplit(owner_url).password or "")
    with psycopg.connect(owner_url, autocommit=True) as connection:
        for login, role in ((WORKER_ROLE, "autotag_worker"), (OPERATOR_ROLE, "autotag_operator")):
            name = sql.Identifier(login)
            with contextlib.suppress(psycopg.errors.DuplicateObject):  # an earlier stack on this server created it
                connection.execute(sql.SQL("create role {} login in role {}").format(name, sql.Identifier(role)))
            connection.execute(sql.SQL("alter role {} password {}").format(name, password))


@contextlib.asynccontextmanager
async def worker_process(
    environment: dict[str, str], log: IO[bytes] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """An ``autotag worker`` process, stopped with SIGTERM at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "autotag", "worker",
        env={"PATH": os.environ.get("PATH", ""), **environment}, stderr=log, stdin=asyncio.subprocess.DEVNULL,
        process_group=group(),
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            await process.wait()
