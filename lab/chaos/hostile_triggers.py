"""Trouble from triggers and constraints on the shared table, which affect only one tenant's rows.

Every trigger counts how often it has fired in a sequence, because a sequence is not rolled back.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import ClassVar

from lab.chaos.auditor import TAGGED
from lab.chaos.hostile_uploads import UPLOADS, Automatic
from lab.chaos.hostilities import KINDS, Hostility
from lab.chaos.tenants import UNSURE, Tenant

NOT_STORED = frozenset({"not_stored"})
CHANGED = frozenset({"ours"})  # tags that a trigger writes instead
LISTED = "exists (select from public.hostile_images h where h.asset_id = new.id)"
ON = "exists (select from public.hostile_now h where h.workspace_id = new.workspace_id)"


class Trigger(Hostility):
    """A trigger on the tenant's rows. `body` is PL/pgSQL that may use `{workspace}` and `{fired}`."""

    timing: ClassVar[str] = "before update on"
    level: ClassVar[str] = "for each row"
    condition: ClassVar[str | None] = "new.tags is distinct from old.tags"
    body: ClassVar[str]
    security: ClassVar[str] = "invoker"

    def __init__(self, tenant: Tenant) -> None:
        super().__init__(tenant)
        self._name = f"hostile_{tenant.workspace.replace('-', '')}"

    async def install(self) -> None:
        workspace, fired = self.tenant.workspace, f"perform nextval('public.{self._name}_fired');"
        body = self.body.replace("{workspace}", workspace).replace("{fired}", fired)
        when = f"when (new.workspace_id = '{workspace}' and {self.condition})" if self.condition else ""
        kind = "constraint trigger" if "deferr" in self.level else "trigger"
        await self.project.execute(f"create sequence public.{self._name}_fired")
        await self.project.execute(
            f"create function public.{self._name}() returns trigger language plpgsql security {self.security}"
            f" as $$ begin {body} end $$"
        )
        await self.project.execute(
            f"create {kind} {self._name} {self.timing} public.assets {self.level} {when}"
            f" execute function public.{self._name}()"
        )

    async def remove(self) -> None:
        await self.project.execute(f"drop trigger {self._name} on public.assets")

    async def happened(self) -> int:
        """How often the trigger has fired."""
        [(last,)] = await self.project.execute(
            f"select case when is_called then last_value else 0 end from public.{self._name}_fired"
        )
        return int(last)

    @contextlib.asynccontextmanager
    async def happen(self) -> AsyncIterator[None]:
        await self.upload()
        yield

    async def upload(self) -> None:
        """The tenant's upload."""
        await self.tenant.upload(self.images)

    async def list(self, assets: list[str]) -> None:
        """Lists the images that the trigger affects."""
        await self.project.execute(
            "insert into public.hostile_images select u, %s from unnest(%s::uuid[]) u", self.tenant.workspace, assets
        )

    @contextlib.asynccontextmanager
    async def on(self) -> AsyncIterator[None]:
        """Turns the trigger on while the context is open."""
        workspace = self.tenant.workspace
        await self.project.execute("insert into public.hostile_now values (%s)", workspace)
        try:
            yield
        finally:
            await self.project.execute("delete from public.hostile_now where workspace_id = %s", workspace)


class Refusing(Trigger):
    """Two images of each upload are refused, always."""

    body = f"if {LISTED} then {{fired}} raise exception 'not this one'; end if; return new;"
    ends: ClassVar[frozenset[str]] = NOT_STORED

    async def upload(self) -> None:
        assets = await self.tenant.insert(self.tenant.choose(self.images))
        refused = assets[1:4:2]
        await self.list(refused)
        self.project.ledger.expect(refused, self.ends | UNSURE)
        await self.tenant.enqueue(assets)
        self.project.ledger.expect(refused, self.ends)


def refusing(name: str, statement: str) -> type[Refusing]:
    """A hostility whose trigger runs a statement that raises an error."""
    body = f"if {LISTED} then {{fired}} {statement} end if; return new;"
    return type(name, (Refusing,), {"name": name, "body": body, "__doc__": f"A trigger: {name}."})


Raising = refusing("a trigger raises an exception", "raise exception 'not this one';")
Asserting = refusing("a trigger's assertion fails", "assert false, 'not this one';")
Dividing = refusing("a trigger divides by zero", "perform 1 / 0;")
#: Errors that mean "the server is going down", "you lost the lease" and "the schema was upgraded" if autotag raises
#: them.
Shutting = refusing("a trigger raises admin_shutdown", "raise exception 'not this one' using errcode = '57P01';")
ReplacedRaising = refusing("a trigger raises AT001", "raise exception 'not this one' using errcode = 'AT001';")
NotHeldRaising = refusing("a trigger raises PT409", "raise exception 'not this one' using errcode = 'PT409';")
VersionRaising = refusing("a trigger raises PT426", "raise exception 'not this one' using errcode = 'PT426';")


class Retryable(Refusing):
    """Two images of each upload are refused for a while, with an error that usually passes."""

    code: ClassVar[str]
    ends = TAGGED | NOT_STORED

    @contextlib.asynccontextmanager
    async def happen(self) -> AsyncIterator[None]:
        async with self.on(), super().happen():
            yield


def retryable(code: str) -> type[Retryable]:
    """A kind whose trigger raises an error that usually passes."""
    name = f"a trigger raises {code}"
    body = (
        f"if {LISTED} and {ON} then {{fired}} raise exception 'not now' using errcode = '{code}'; end if; return new;"
    )
    return type(name, (Retryable,), {"name": name, "body": body, "__doc__": f"A trigger: {name}."})


LockRaising = retryable("lock_not_available")
DeadlockRaising = retryable("deadlock_detected")
CancelRaising = retryable("query_canceled")
SerializationRaising = retryable("serialization_failure")


class RaisingAtCommit(Refusing):
    """A constraint trigger raises when the transaction commits.

    At commit, Postgres runs the trigger as the login, whoever owns the function that made the update; `LoggingAtCommit`
    shows that.
    """

    name = "a constraint trigger raises at commit"
    security = "definer"
    timing = "after update on"
    level = "deferrable initially deferred for each row"
    body = f"if {LISTED} then {{fired}} raise exception 'not this one'; end if; return null;"


class RaisingForStatement(Refusing):
    """A trigger raises after a statement that changed a certain row."""

    name = "a trigger raises after the statement"
    timing = "after update on"
    level = "referencing new table as changed for each statement"
    condition = None
    body = """
        if exists (select from changed c join public.hostile_images h on h.asset_id = c.id
          where h.workspace_id = '{workspace}' and c.tags is not null) then
          {fired} raise exception 'not this one';
        end if;
        return null;"""


class Swallowing(Refusing):
    """A trigger swallows the update of certain rows."""

    name = "a trigger swallows the update"
    body = f"if {LISTED} then {{fired}} return null; end if; return new;"


class Changing(Trigger):
    """A trigger writes other tags."""

    name = "a trigger changes the update"
    body = f"if {LISTED} then {{fired}} new.tags := array['ours']; end if; return new;"

    async def upload(self) -> None:
        assets = await self.tenant.insert(self.tenant.choose(self.images))
        await self.list(assets[:2])
        for asset in assets[:2]:
            self.project.ledger.truth[asset] = CHANGED
        await self.tenant.enqueue(assets)


class Setting(Trigger):
    """A trigger sets parameters of the session, which outlive the transaction."""

    name = "a trigger sets parameters of the session"
    body = """
        {fired}
        perform set_config('statement_timeout', '1', false), set_config('default_transaction_read_only', 'on', false),
          set_config('default_transaction_isolation', 'serializable', false),
          set_config('search_path', 'nowhere', false);
        return new;"""


class Deallocating(Trigger):
    """A trigger removes the session's prepared statements."""

    name = "a trigger deallocates all prepared statements"
    body = "{fired} deallocate all; return new;"


class Slow(Trigger):
    """A trigger sleeps while the hostility lasts."""

    name = "a trigger sleeps"
    ends: ClassVar = TAGGED | NOT_STORED
    body = f"{{fired}} while {ON} loop perform pg_sleep(0.1); end loop; return new;"

    @contextlib.asynccontextmanager
    async def happen(self) -> AsyncIterator[None]:
        await self.tenant.upload(self.images, self.ends)
        async with self.on():
            yield


class Logging(Trigger):
    """A trigger writes into a table that it names without its schema."""

    name = "a trigger writes a log table without naming its schema"
    body = "{fired} insert into hostile_log (asset_id, what) values (new.id, new.tagging_stage); return new;"


class LoggingAtCommit(Trigger):
    """A constraint trigger writes a log table when the transaction commits; the project's owner may write it."""

    name = "a constraint trigger writes a log table at commit"
    timing = "after update on"
    level = "deferrable initially deferred for each row"
    body = """
        {fired} insert into public.hostile_log (asset_id, what) values (new.id, new.tagging_stage); return null;"""


class Counting(Trigger):
    """A trigger updates a counter, whose row another transaction holds."""

    name = "a trigger updates a counter that is locked"
    ends: ClassVar = TAGGED | NOT_STORED
    body = "{fired} update public.hostile_counters set n = n + 1 where workspace_id = new.workspace_id; return new;"

    async def install(self) -> None:
        await super().install()
        await self.project.execute("insert into public.hostile_counters values (%s)", self.tenant.workspace)

    @contextlib.asynccontextmanager
    async def happen(self) -> AsyncIterator[None]:
        async with self.project.connect() as connection:
            await connection.execute(
                "select from public.hostile_counters where workspace_id = %s for update", (self.tenant.workspace,)
            )
            await self.tenant.upload(self.images, self.ends)
            yield


class Check(Hostility):
    """A CHECK constraint refuses a tag."""

    name = "a check refuses some tags"

    def __init__(self, tenant: Tenant) -> None:
        super().__init__(tenant)
        self._tag = next(tag for tag in sorted(self.tenant.files[0][1]) if tag.startswith("top left"))
        self._name = f"hostile_{self.tenant.workspace.replace('-', '')}"

    async def install(self) -> None:
        await self.project.execute(
            f"alter table public.assets add constraint {self._name} check"
            f" (workspace_id <> '{self.tenant.workspace}' or tags is null or '{self._tag}' <> all (tags)) not valid"
        )

    async def remove(self) -> None:
        await self.project.execute(f"alter table public.assets drop constraint {self._name}")

    @contextlib.asynccontextmanager
    async def happen(self) -> AsyncIterator[None]:
        ledger = self.project.ledger
        others = [file for file in self.tenant.choose(self.images) if file != self.tenant.files[0]]
        assets = await self.tenant.insert([self.tenant.files[0], *others])
        refused = [asset for asset in assets if self._tag in ledger.truth[asset]]
        ledger.expect(refused, NOT_STORED | UNSURE)
        await self.tenant.enqueue(assets)
        ledger.expect(refused, NOT_STORED)
        yield

    async def happened(self) -> int:
        """Answers of the provider that the constraint refuses."""
        refused = {picture for _, picture in self.tenant.files if self._tag in picture}
        log = self.project.stack.simulator.request_log
        return sum(entry["status"] == 200 and frozenset(entry.get("tags") or ()) in refused for entry in log)


class AutomaticRefusal(Trigger, Automatic):
    """In automatic mode, rows that refuse every update, so they can show neither that they wait nor that they
    failed."""

    name = "rows that refuse every update in automatic mode"
    condition = "true"
    body = "{fired} raise exception 'not this one';"

    async def install(self) -> None:
        await Trigger.install(self)
        await Automatic.install(self)

    async def upload(self) -> None:
        assets = await self.tenant.insert(self.tenant.choose(self.images))
        self.project.ledger.expect(assets, frozenset({"untouched"}))


TRIGGERS: tuple[type[Hostility], ...] = (
    Raising, Asserting, Dividing, Shutting, ReplacedRaising, NotHeldRaising, VersionRaising, LockRaising,
    DeadlockRaising, CancelRaising, SerializationRaising, RaisingAtCommit, RaisingForStatement, Swallowing, Changing,
    Setting, Deallocating, Slow, Logging, LoggingAtCommit, Counting, Check, AutomaticRefusal,
)  # fmt: skip

ALL_KINDS = (*KINDS, *UPLOADS, *TRIGGERS)
