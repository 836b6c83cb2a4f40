"""The calls of an operator's commands."""

from __future__ import annotations

import json
from datetime import date
from typing import Any, cast

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from autotag.db.messages import ObservedLimits, Refused
from autotag.db.operator_messages import (
    Admission,
    BackfillPart,
    ComparedImage,
    ComparisonPreview,
    ComparisonReport,
    ComparisonStep,
    Diagnosis,
    ModelQuestion,
)  # fmt: skip


class Operator:
    """The calls of the operator's commands (doctor, status, enqueue, usage, compare), on one connection."""

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection
        self.server_version = connection.info.parameter_status("server_version")

    @classmethod
    async def connect(cls, url: str, seconds: int = 10) -> Operator:
        """Raises:
        psycopg.OperationalError: no connection within so many seconds.
        """
        return cls(
            await psycopg.AsyncConnection.connect(
                url,
                autocommit=True,
                application_name="autotag operator",
                prepare_threshold=None,
                connect_timeout=seconds,
            )
        )

    async def __aenter__(self) -> Operator:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connection.close()

    async def _value(self, statement: str, *arguments: object) -> Any:
        """Raises:
        Refused: with what the database says, and when to try again.
        """
        try:
            row = await (await self._connection.execute(statement, arguments)).fetchone()
        except psycopg.DatabaseError as error:
            if not (error.sqlstate or "").startswith("PT"):
                raise
            detail = json.loads(error.diag.message_detail or "{}")
            raise Refused(str(error.diag.message_primary), error.diag.message_hint, detail.get("retry_after")) from None
        return row[0] if row else None

    async def schema_version(self) -> str:
        return str(await self._value("select autotag.schema_version()"))

    async def diagnose(self) -> Diagnosis:
        """What the database can tell of itself."""
        return cast("Diagnosis", await self._value("select autotag.diagnose()"))

    async def send_test_broadcast(self, nonce: str) -> None:
        await self._value("select autotag.send_test_broadcast(%s)", nonce)

    async def status(self) -> dict[str, Any]:
        """Everything that is going on; see ``autotag.status`` in the migrations."""
        return cast("dict[str, Any]", await self._value("select autotag.status()"))

    async def preview_backfill(self, workspace: str, untagged: bool, after: str | None, limit: int) -> dict[str, Any]:
        """``{images, seconds, cost, model}`` of bringing in existing images; cost None: the model has no price."""
        return cast("dict[str, Any]", await self._value(
            "select autotag.preview_backfill(%s, %s, %s, %s)", workspace, untagged, after, limit))  # fmt: skip

    async def backfill(self, workspace: str, untagged: bool, after: str | None, limit: int) -> BackfillPart:
        """Brings in the next slice.

        Raises:
            Refused: with what the database says, and when to try again.
        """
        return cast("BackfillPart", await self._value(
            "select autotag.backfill(%s, %s, %s, %s)", workspace, untagged, after, limit))  # fmt: skip

    async def preview_comparison(
        self, workspace: str, model: str, effort: str | None, sample: int
    ) -> ComparisonPreview:
        """What asking another model about tagged images would mean.

        Raises:
            Refused: no such effort, no tagged image, or a quota does not allow it.
        """
        return cast("ComparisonPreview", await self._value(
            "select autotag.preview_comparison(%s, %s, %s, %s)", workspace, model, effort, sample))  # fmt: skip

    async def comparison_sample(self, workspace: str, sample: int) -> list[ComparedImage]:
        """The images to compare."""
        return cast("list[ComparedImage]", await self._value(
            "select autotag.comparison_sample(%s, %s)", workspace, sample))  # fmt: skip

    async def admit_comparison(self, workspace: str, question: ModelQuestion, cap: int | None) -> Admission:
        """A place for one call under all limits, or how long to wait for it.

        Raises:
            Refused: a quota does not allow it any more, or no limit can ever hold it.
        """
        return cast("Admission", await self._value(
            "select autotag.admit_comparison(%s, %s, %s)", workspace, Jsonb(question), cap))  # fmt: skip

    async def settle_comparison(
        self, workspace: str, question: ModelQuestion, report: ComparisonReport, seen: ObservedLimits | None
    ) -> ComparisonStep:
        """Reports what came of one call, and learns what to do next about its image."""
        return cast("ComparisonStep", await self._value(
            "select autotag.settle_comparison(%s, %s, %s, %s)",
            workspace, Jsonb(question), Jsonb(report), Jsonb(seen) if seen else None,
        ))  # fmt: skip

    async def usage(self, workspace: str, since: date, until: date) -> list[dict[str, Any]]:
        """Rows per user, day, model and service tier; cost None: the model has no price."""
        async with self._connection.cursor(row_factory=dict_row) as cursor:
            await cursor.execute("select * from autotag.list_usage(%s, %s, %s)", (workspace, since, until))
            return await cursor.fetchall()
