"""Two workspaces in one project: secrets that an attacker must not reach, and functions that show whether they did."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import psycopg
from psycopg import sql
from websockets.asyncio.client import ClientConnection, connect

from attacks.attempt import Answer
from lab.pictures import draw
from lab.stack import Stack
from support import PATIENCE, Library

SCHEMAS = ("autotag", "public", "storage", "realtime", "auth", "cron")
#: Columns that change by themselves while a worker runs.
VOLATILE = {
    "autotag.workers": ("last_heartbeat_at", "claim", "batch_claim"), "autotag.provider_limits": ("next_poll_at", "checked_at", "refilled_at"),
    "autotag.clock": ("ticked_at",),
}  # fmt: skip
SECRET_TAG, SECRET_CAPTION = "tag-only-its-members-see", "A caption that only its members see."


class Scene:
    """A victim with everything that a tenant has, and attackers beside them.

    attackers: `nobody` is signed in and belongs to no workspace; `neighbour` to another one; `member` to one whose
    limits they are tired of.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.victim = Library(stack)
        self.neighbour = Library(stack, stack.add_member("neighbour"))
        self.member = Library(stack, stack.add_member("member"))
        self.nobody = str(uuid.uuid4())
        self.secrets: dict[str, str] = {}
        self.ids: dict[str, str] = {}
        self.heard: list[str] = []
        self.pictures: dict[str, bytes] = {}
        self.http = httpx.AsyncClient(timeout=15)
        self._connections: dict[str, psycopg.Connection[Any]] = {}

    def token(self, caller: str) -> str:
        if caller == "anon":
            return ""
        return self.stack.token(self.nobody) if caller == "nobody" else self.of(caller).member.token

    def user(self, caller: str) -> str | None:
        """The id of the caller's user; None: nobody is signed in."""
        if caller in ("anon", "nobody"):
            return self.nobody if caller == "nobody" else None
        return self.of(caller).member.user

    def of(self, caller: str) -> Library:
        return {"neighbour": self.neighbour, "member": self.member, "victim": self.victim}[caller]

    def connection(self, caller: str) -> psycopg.Connection[Any]:
        """A connection with the role and claims of a caller."""
        if caller not in self._connections:
            connection = psycopg.connect(self.stack.database_url("authenticator"), autocommit=True)
            user = self.user(caller)
            role = "authenticated" if user else "anon"
            claims = {"role": role, **({"sub": user} if user else {})}
            connection.execute(
                "select set_config('request.jwt.claims', %s, false), set_config('role', %s, false),"
                " set_config('statement_timeout', '5s', false)",
                (json.dumps(claims), role),
            )
            self._connections[caller] = connection
        return self._connections[caller]

    # -- before

    async def furnish(self) -> None:
        """The victim's uploads in every state, with texts and secrets that nobody else may see."""
        victim, stack = self.victim, self.stack
        victim.sql("insert into auth.users (id, email) values (%s, %s)", self.nobody, f"{self.nobody}@example.org")
        tagged, failed, live = await victim.upload(list(draw(3, seed=7)))
        [theirs] = victim.insert([f"{victim.member.workspace}/mother-in-law.jpg"])
        canceled = victim.enqueue([failed])["job_id"]
        victim.rpc("public.cancel_tagging", canceled)
        job = victim.enqueue([live])["job_id"]
        victim.sql(
            "update public.assets set tags = %s, tagging_result = %s, tagging_stage = 'completed' where id = %s",
            [SECRET_TAG], json.dumps({"caption": SECRET_CAPTION}), tagged,
        )  # fmt: skip
        for caller in ("neighbour", "member"):
            own = self.of(caller)
            await own.upload(list(draw(2, seed=8 + len(caller))), seed=2)
        victim.sql("insert into autotag.quotas (workspace_id, scope, period, max_images) values (%s, 'workspace', 'day', 4711)",
                   victim.member.workspace)  # fmt: skip
        victim.sql("select public.check_rate_limit(%s, 'realtime', 1)", victim.member.workspace)
        victim.sql(
            "insert into autotag.usage (workspace_id, user_id, day, model, service_tier, images, requests)"
            " values (%s, %s, '2026-11-01', 'model-of-the-victim', 'default', 1, 1)",
            victim.member.workspace, victim.member.user,
        )  # fmt: skip
        victim.sql("insert into autotag.webhooks values ('wh-of-the-operator', 'batch-of-the-operator', now())")
        victim.sql("""insert into autotag.outbox (topic, event, payload, private, created_at)
                      values (%s, 'job-complete', '{"a": "in-the-outbox"}', true, now())""",
                   f"tagging:{victim.member.workspace}")  # fmt: skip
        paths = [row["storage_path"] for row in victim.assets().values()]
        self.ids = {"asset": tagged, "failed asset": failed, "live asset": live, "fileless asset": theirs, "job": job,
                    "cancelled job": canceled, "workspace": victim.member.workspace, "path": paths[0]}  # fmt: skip
        self.secrets = {
            **{f"the victim's {name}": value for name, value in self.ids.items()},
            "the victim's user": victim.member.user, "the victim's tag": SECRET_TAG, "the victim's caption": SECRET_CAPTION,
            "the victim's model": "model-of-the-victim", "a webhook": "wh-of-the-operator", "the outbox": "in-the-outbox",
            "the secret key": stack.secret_key, "the JWT secret": stack.jwt_secret,
            "a database password": stack.owner_url.split("@")[0].rpartition(":")[2],
            "the webhook's secret": stack.simulator.plan.webhook_secret, "the victim's token": victim.member.token,
            "OpenAI's key": stack.openai_key,
        }  # fmt: skip
        self.pictures = {path: await self._file(path) for path in paths[:3]}

    async def _file(self, path: str) -> bytes:
        try:
            return bytes(await self.stack.storage().from_("assets").download(path))
        except Exception:  # it is not there
            return b""

    # -- after

    def leaks(self, answer: Answer) -> list[str]:
        """The names of secrets that are in the answer but were not in the request."""
        return [name for name, value in self.secrets.items() if value in answer.received and value not in answer.sent]

    def snapshot(self, attacker: str = "") -> dict[str, Counter[str]]:
        """Every row that does not belong to the attacker, and all privileges."""
        own = self.of(attacker).member.workspace if attacker in ("neighbour", "member") else str(uuid.uuid4())
        seen: dict[str, Counter[str]] = {}
        with psycopg.connect(self.stack.database_url("supabase_admin"), autocommit=True) as connection:
            tables = connection.execute(
                "select n.nspname, c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace"
                " where c.relkind in ('r', 'p') and n.nspname = any (%s)", (list(SCHEMAS),)).fetchall()  # fmt: skip
            for schema, table in tables:
                name = f"{schema}.{table}"
                rows = connection.execute(
                    sql.SQL("select (to_jsonb(t) - %s::text[])::text, to_jsonb(t) from {} t").format(
                        sql.Identifier(schema, table)
                    ),
                    (list(VOLATILE.get(name, ())),),
                ).fetchall()
                seen[name] = Counter(text for text, row in rows if not _is_own(name, row, own))
            for what in ("select p.oid::regprocedure::text, p.proacl::text, md5(p.prosrc), p.prosecdef from pg_proc p"
                         " join pg_namespace n on n.oid = p.pronamespace where n.nspname !~ '^pg_t'",
                         "select c.oid::regclass::text, c.relacl::text, c.relrowsecurity, c.relkind::text from pg_class c"
                         " join pg_namespace n on n.oid = c.relnamespace where n.nspname !~ '^pg_t'",
                         "select * from pg_policies", "select rolname, rolsuper, rolcanlogin, rolbypassrls from pg_roles",
                         "select tgname, tgrelid::regclass::text, tgenabled::text from pg_trigger",
                         "select setdatabase, setrole, setconfig::text from pg_db_role_setting"):  # fmt: skip
                seen[what.split("from ")[1].split()[0]] = Counter(
                    map(str, connection.execute(what.encode()).fetchall())
                )
        return seen

    async def findings(self, before: dict[str, Counter[str]], attacker: str = "") -> list[str]:
        """Everything that has changed since ``before`` and does not belong to the attacker."""
        after, found = self.snapshot(attacker), []
        for name in sorted(before.keys() | after.keys()):
            was, is_now = before.get(name, Counter()), after.get(name, Counter())
            found += [f"changed: {name} lost {row[:300]}" for row in (was - is_now)]
            found += [f"changed: {name} got {row[:300]}" for row in (is_now - was)]
        for path, data in self.pictures.items():
            if await self._file(path) != data:
                found.append(f"changed: the file {path}")
        found += [f"heard by the victim: {message[:300]}" for message in self.heard]
        return found

    # -- the victim's own browser

    @contextlib.asynccontextmanager
    async def victim_listens(self) -> AsyncIterator[None]:
        """Joins the victim to their private topic. Messages that others have caused are in `heard` afterwards."""
        topic = f"tagging:{self.victim.member.workspace}"
        socket = await open_socket(self.stack, self.victim.member.token)
        await socket.send(json.dumps(["1", "1", f"realtime:{topic}", "phx_join",
                                      {"config": {"private": True}, "access_token": self.victim.member.token}]))  # fmt: skip
        assert json.loads(await socket.recv())[4]["status"] == "ok"
        yield
        end = secrets.token_hex(8)
        self.victim.sql(
            "select realtime.send(jsonb_build_object('end', %s::text), 'job-complete', %s, true)", end, topic
        )
        async with asyncio.timeout(PATIENCE):
            while end not in (message := await _text(socket)):
                self.heard.append(message)
        self.victim.sql("delete from realtime.messages where topic = %s and payload ->> 'end' = %s", topic, end)
        await socket.close()

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections.values():
            connection.close()


def _is_own(table: str, row: dict[str, Any], own: str) -> bool:
    """Whether the attacker may change a row: it belongs to their workspace, and is not one of its limits."""
    if table in ("public.workspace_rate_limits", "autotag.quotas", "autotag.usage", "public.workspace_members"):
        return False
    if table == "storage.objects":
        return str(row["name"]).startswith(f"{own}/")
    if table == "realtime.messages":
        return row["topic"] == f"tagging:{own}"
    return str(row.get("workspace_id")) == own


async def _text(socket: ClientConnection) -> str:
    message = await socket.recv()
    return message.decode(errors="replace") if isinstance(message, bytes) else message


async def open_socket(stack: Stack, token: str, version: str = "2.0.0") -> ClientConnection:
    base = stack.supabase_url.replace("http", "ws")
    return await connect(f"{base}/realtime/v1/websocket?apikey={token or stack.anon_key}&vsn={version}")


@contextlib.asynccontextmanager
async def set_scene(stack: Stack) -> AsyncIterator[Scene]:
    """A furnished scene."""
    with Scene(stack) as scene:
        await scene.furnish()
        async with scene.http:
            yield scene
