"""Connections to one database that are kept, for those who look all the time."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Iterator
from typing import Any

import psycopg

Connection = psycopg.Connection[Any]


class KeptConnections:
    """Connections that threads may share.

    A look over a new one takes 17 ms of processor time (the password, the catalogue, the functions); over one that is
    there, 2 ms.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._free: list[Connection] = []

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction, committed at the end, however long the server takes to come back."""
        connection = self._take()
        try:
            with connection.transaction():
                yield connection
        except psycopg.OperationalError:
            connection.close()
            raise
        finally:
            if not connection.closed:
                self._free.append(connection)

    def close(self) -> None:
        """Closes those that are free."""
        while self._free:
            self._free.pop().close()

    def _take(self) -> Connection:
        while self._free:
            connection = self._free.pop()
            if not select.select([connection], [], [], 0)[0]:
                return connection
            connection.close()  # the server has said something: that it ends the session
        while True:
            try:
                return psycopg.connect(self._url, connect_timeout=2, autocommit=True)
            except psycopg.OperationalError:
                time.sleep(0.1)
