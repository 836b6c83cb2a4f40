"""``autotag watch``: shows the messages that browsers get."""

from __future__ import annotations

import asyncio
import logging
import sys
from datetime import datetime
from typing import Annotated, Any, Literal

import psycopg
import typer

from autotag.cli.console import fail, say, say_json
from autotag.cli.errors import FAILED, WRONG_USAGE
from autotag.cli.options import SUPABASE_SECRET_KEY, SUPABASE_URL, WORKER_URL, Json, help_end, read_settings
from autotag.config import DoctorSettings
from autotag.db import Operator
from autotag.texts import printable

MAX_VALUES, MAX_VALUE = 20, 100  # values of a message that are shown, and characters of each
HELP_END = help_end(
    environment=[SUPABASE_URL, SUPABASE_SECRET_KEY, WORKER_URL],
    examples=["autotag watch", "autotag watch --workspace <id> --json"],
)
PrivateTopic = Annotated[
    str | None, typer.Option("--workspace", metavar="ID", help="Follow this workspace's private topic too.")
]


def watch(workspace: PrivateTopic = None, as_json: Json = False) -> None:
    """Show the messages that browsers get over Realtime, until Ctrl-C.

    Prints one line for each message: the time, the topic, the event and the
    payload. Without --workspace it follows the public topic, batch-updates.

    It reconnects as often as it takes. Realtime keeps nothing: what is sent
    meanwhile is lost, so it says when the connection was lost and is back
    (with --json as the events "lost" and "back" without a topic).
    """
    from autotag.operate.follow import CannotFollow, follow

    settings = read_settings(DoctorSettings)
    if workspace:
        asyncio.run(_warn_if_unknown(str(settings.database_url), workspace))
    key = settings.secret_key()
    if not settings.supabase_url or not key:
        raise fail("SUPABASE_URL and SUPABASE_SECRET_KEY are not both set; set them.", WRONG_USAGE)

    def show_message(topic: str, event: str, payload: dict[str, Any]) -> None:
        if as_json:
            say_json({"topic": topic, "event": event, "payload": payload})
        else:
            say(f"{datetime.now():%H:%M:%S}  {topic:<45}  {event:<14}  {describe_payload(payload)}")
        sys.stdout.flush()

    def show_connection(what: Literal["lost", "back"], seconds: float) -> None:
        if as_json:
            say_json({"topic": None, "event": what, "payload": {"seconds": round(seconds, 1)}})
        elif what == "lost":
            say(f"{datetime.now():%H:%M:%S}  The connection to Realtime was lost; reconnecting …")
        else:
            say(f"{datetime.now():%H:%M:%S}  The connection is back after {seconds:.0f} s. Messages of that time are"
                " lost; autotag status shows what has happened.")  # fmt: skip
        sys.stdout.flush()

    logging.getLogger("realtime").setLevel(logging.CRITICAL)  # it logs every try to connect
    try:
        asyncio.run(follow(settings.supabase_url, key, workspace, show_message, show_connection))
    except KeyboardInterrupt:
        return
    except CannotFollow as error:
        raise fail(str(error), FAILED) from None


async def _warn_if_unknown(url: str, workspace: str) -> None:
    """Warns if nothing belongs to the workspace. A worker's login may not query that, so it gets no warning."""
    try:
        async with await Operator.connect(url) as operator:
            known = await operator.knows_workspace(workspace)
    except psycopg.DataError:  # it is not a valid id
        known = False
    except psycopg.Error:
        return
    if not known:
        say(
            f"Unknown workspace {workspace}: no image, upload or setting belongs to it yet; check --workspace.",
            err=True,
        )


def describe_payload(payload: dict[str, Any]) -> str:
    """A payload in one line. Everyone with the publishable key can send one to a public topic."""
    return " ".join(
        f"{printable(name, MAX_VALUE)}={printable(value, MAX_VALUE)}"
        for name, value in list(payload.items())[:MAX_VALUES] if value is not None
    )  # fmt: skip
