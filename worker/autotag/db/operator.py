"""The database calls of the operator's commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any, TypeVar, cast

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from autotag.db.errors import Refused, refusal
from autotag.db.messages import ObservedLimits
from autotag.db.operator_messages import (
    Admission,
    BackfillPart,
    BackfillPreview,
    ComparedImage,
    ComparisonPreview,
    ComparisonReport,
    ComparisonStep,
    Diagnosis,
    FindingRow,
    ModelQuestion,
    SystemStatus,
    UsageRow,
)  # fmt: skip
from autotag.db.profiles import Profile, ProfileChanges
from autotag.db.readers import Reader, many, nothing, one
from autotag.db.vocabulary import Entry, TagsInUse, UsesCounted, VocabularyChange

R = TypeVar("R")


class Operator:
    """The database calls of the operator's commands, from doctor to vocabulary, on one connection."""

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection
        self.server_version = connection.info.parameter_status("server_version")

    @classmethod
    async def connect(cls, url: str, seconds: int = 10) -> Operator:
        """Connects.

        Raises:
            psycopg.OperationalError: no connection within ``seconds``.
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

    async def _value(self, read: Reader[R], statement: str, *arguments: object) -> R:
        """Executes a statement of one column and returns what it says.

        Raises:
            Refused: the database refuses, with its message and the time of the next try.
        """
        try:
            row = await (await self._connection.execute(statement, arguments)).fetchone()
        except psycopg.DatabaseError as error:
            detail = refusal(error)
            if detail is None:
                raise
            raise Refused(
                str(error.diag.message_primary), error.diag.message_hint, detail.get("retry_after"), detail
            ) from None
        return read(row[0] if row else None)

    async def schema_version(self) -> str:
        """The version of the schema."""
        return await self._value(str, "select autotag.schema_version()")

    async def diagnose(self) -> Diagnosis:
        """The findings of the database, for ``autotag doctor``."""
        return await self._value(one(Diagnosis), "select autotag.diagnose()")

    async def diagnose_write(self, triggers: bool) -> FindingRow:
        """Whether a row of an image takes tags. triggers: also if triggers of the project run when it is tried."""
        return await self._value(one(FindingRow), "select autotag.diagnose_write(%s)", triggers)

    async def send_test_broadcast(self, nonce: str) -> None:
        """Sends a broadcast that contains ``nonce``."""
        await self._value(nothing, "select autotag.send_test_broadcast(%s)", nonce)

    async def status(self) -> SystemStatus:
        """The current state of the whole system."""
        return await self._value(one(SystemStatus), "select autotag.status()")

    async def preview_backfill(
        self, workspace: str, untagged: bool, after: str | None, limit: int, *, outdated: bool = False
    ) -> BackfillPreview:
        """Predicts a backfill."""
        return await self._value(
            one(BackfillPreview),
            "select autotag.preview_backfill(%s, %s, %s, %s, %s)",
            workspace,
            untagged,
            after,
            limit,
            outdated,
        )

    async def backfill(
        self, workspace: str, untagged: bool, after: str | None, limit: int, *, outdated: bool = False
    ) -> BackfillPart:
        """Enqueues the next part of the existing images.

        Raises:
            Refused: the database refuses, with its message and the time of the next try.
        """
        return await self._value(
            one(BackfillPart),
            "select autotag.backfill(%s, %s, %s, %s, %s)",
            workspace,
            untagged,
            after,
            limit,
            outdated,
        )

    async def preview_comparison(
        self, workspace: str, model: str, effort: str | None, sample: int
    ) -> ComparisonPreview:
        """Predicts a comparison with another model.

        Raises:
            Refused: unknown effort, no tagged images, or a quota is exceeded.
        """
        return await self._value(
            one(ComparisonPreview),
            "select autotag.preview_comparison(%s, %s, %s, %s)",
            workspace,
            model,
            effort,
            sample,
        )

    async def comparison_sample(self, workspace: str, sample: int) -> list[ComparedImage]:
        """The images of a comparison."""
        return await self._value(many(ComparedImage), "select autotag.comparison_sample(%s, %s)", workspace, sample)

    async def admit_comparison(self, workspace: str, question: ModelQuestion, cap: int | None) -> Admission:
        """Admits one call under all limits, or returns how long to wait.

        Raises:
            Refused: a quota is exceeded, or the call is larger than a limit.
        """
        return await self._value(
            one(Admission), "select autotag.admit_comparison(%s, %s, %s)", workspace, Jsonb(question), cap
        )

    async def settle_comparison(
        self, workspace: str, question: ModelQuestion, report: ComparisonReport, observed: ObservedLimits | None
    ) -> ComparisonStep:
        """Reports the outcome of one call; returns what to do next with its image."""
        return await self._value(
            one(ComparisonStep),
            "select autotag.settle_comparison(%s, %s, %s, %s)",
            workspace,
            Jsonb(question),
            Jsonb(report),
            Jsonb(observed) if observed else None,
        )

    async def knows_workspace(self, workspace: str) -> bool:
        """Whether an image, an upload, usage or a setting belongs to a workspace."""
        return await self._value(bool, "select autotag.knows_workspace(%s)", workspace)

    async def profile(self, workspace: str | None) -> Profile:
        """The profile in force for a workspace. None: the profile of all workspaces that have none of their own."""
        return await self._value(one(Profile), "select autotag.show_profile(%s)", workspace)

    async def set_profile(self, workspace: str | None, changes: ProfileChanges) -> Profile:
        """Saves changes as a new version, and returns it.

        Raises:
            Refused: a change is invalid.
        """
        return await self._value(one(Profile), "select autotag.set_profile(%s, %s)", workspace, Jsonb(changes))

    async def profile_history(self, workspace: str | None) -> list[Profile]:
        """The versions of a workspace's own profile (None: of the one for all), the newest first."""
        return await self._value(many(Profile), "select autotag.profile_history(%s)", workspace)

    async def list_vocabulary(self, workspace: str | None) -> list[Entry]:
        """The entries of a workspace's own vocabulary (None: of the one for all)."""
        return await self._value(many(Entry), "select autotag.list_vocabulary(%s)", workspace)

    async def edit_vocabulary(
        self, workspace: str | None, entries: Sequence[Entry], *, replace: bool = False, dry_run: bool = False
    ) -> VocabularyChange:
        """Adds or changes entries; with ``replace``, deletes all others. ``dry_run``: roll back.

        Raises:
            Refused: an entry is invalid. Nothing was changed.
        """
        async with self._connection.transaction(force_rollback=dry_run):
            return await self._value(
                one(VocabularyChange),
                "select autotag.edit_vocabulary(%s, %s, '{}', %s)",
                workspace,
                Jsonb(entries),
                replace,
            )

    async def tags_in_use(self, workspace: str | None, after: str | int | None, limit: int) -> TagsInUse:
        """The tags of the next images by id."""
        return await self._value(one(TagsInUse), "select autotag.tags_in_use(%s, %s, %s)", workspace, after, limit)

    async def count_uses(
        self, workspace: str | None, counts: Mapping[str, int], least: int, *, dry_run: bool = False
    ) -> UsesCounted:
        """Records how many images have each tag, and adds tags that at least ``least`` images have. ``dry_run``: roll
        back."""
        async with self._connection.transaction(force_rollback=dry_run):
            return await self._value(
                one(UsesCounted), "select autotag.count_uses(%s, %s, %s)", workspace, Jsonb(dict(counts)), least
            )

    async def usage(self, workspace: str, since: date, until: date) -> list[UsageRow]:
        """Usage by user, day, model and service tier."""
        async with self._connection.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(
                """select u.user_id::text, u.day, u.model, u.service_tier, u.images, u.requests, u.input_tokens,
                u.cached_tokens, u.cache_write_tokens, u.output_tokens, u.reasoning_tokens, u.cost
                from autotag.list_usage(%s, %s, %s) u""",
                (workspace, since, until),
            )
            return cast("list[UsageRow]", await cursor.fetchall())
