"""``autotag uninstall``: takes autotag out of a project's database."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from autotag.cli import options
from autotag.cli.console import count, fail, note_json, say, say_json
from autotag.cli.errors import FAILED, LOCAL_DATABASE, WRONG_USAGE, explain_install_errors
from autotag.cli.questions import on_terminal
from autotag.install.uninstall import DROP_ROLES, InUse, Plan, drop_autotag, make_plan

HELP_END = options.help_end(
    environment=[options.OWNER_URL],
    dotenv=False,
    examples=[
        "autotag uninstall --dry-run", "autotag uninstall --yes --keep-stages",
        "autotag uninstall --cascade 'view public.tagged_photos'",
    ],
)  # fmt: skip
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show what would be dropped.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Drop without asking.")]
Json = Annotated[bool, typer.Option("--json", callback=note_json, help="Print JSON. Drops nothing without --yes.")]
KeepStages = Annotated[
    bool, typer.Option("--keep-stages", help="Keep the columns tagging_stage, _progress, _eta and _error.")
]
DropResults = Annotated[
    bool, typer.Option("--drop-results", help="Drop the column tagging_result (captions, fields) too.")
]
Cascade = Annotated[
    list[str],
    typer.Option(
        metavar="NAME",
        help="This object of yours, which uses autotag, may be dropped or may stop working. Repeat it for each.",
    ),
]


def uninstall(
    database_url: options.DatabaseUrl = LOCAL_DATABASE,
    dry_run: DryRun = False,
    keep_stages: KeepStages = False,
    drop_results: DropResults = False,
    cascade: Cascade = [],  # noqa: B006 - typer makes a new one
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Take autotag out of a database. Your tags stay.

    Shows what it will drop: the schema autotag, the functions in public, the
    columns with the stage of an image, the cron jobs, and the rows of the
    migration history, so that autotag can be installed again. Shows what is
    lost with the schema (vocabulary, profiles, quotas, usage, uploads that run),
    and how to export it. Stop the workers
    first. If something of yours uses autotag, it stops and names it.
    """
    url = options.read_database_url(database_url)
    interactive = on_terminal() and not (yes or as_json)
    with explain_install_errors(url, "Nothing was dropped"):
        plan = make_plan(url, keep_stages=keep_stages, drop_results=drop_results)
        blocked = [name for name in plan.yours if name not in cascade]
        drops = not (plan.empty or blocked or dry_run) and (yes or (interactive and not as_json))
        if not as_json:
            _show(plan, blocked)
        if drops and not yes:
            lost = ", ".join(loss.what for loss in plan.losses)
            drops = typer.confirm(f"Drop this, and lose {lost}?" if lost else "Drop this?")
        if drops:
            try:
                plan = drop_autotag(url, keep_stages=keep_stages, drop_results=drop_results, also=cascade)
            except InUse as error:  # the objects were created after the plan was shown
                raise fail(f"Your database uses what would be dropped: {error}; nothing was dropped.", FAILED) from None
    if as_json:
        say_json({**asdict(plan), "blocked_by": blocked, "dropped": drops})
    elif drops:
        say("autotag is uninstalled. autotag init or autotag migrate installs it again.")
        files = ", ".join(f"{name}.sql" for name in plan.migrations)
        old = f"these files from supabase/migrations: {files}" if files else "autotag's files from supabase/migrations"
        say(f"Now delete {old}. Otherwise, supabase db push installs autotag again.")
        say("The roles belong to the whole server and stay; to drop them:")
        say(f"  {DROP_ROLES}")
    if blocked and not dry_run:
        raise fail(
            "Your own objects use autotag, so nothing was dropped. Change them, or name each with --cascade.", FAILED
        )
    if not (drops or plan.empty or dry_run or as_json or interactive):
        raise fail("Nothing was dropped, because nobody could be asked; add --yes.", WRONG_USAGE)


def _show(plan: Plan, blocked: list[str]) -> None:
    """Prints what will be dropped, what stays, and what prevents uninstalling."""
    if plan.empty:
        say("There is nothing of autotag in this database.")
        return
    parts = {
        "schema": ["autotag, with all its tables and functions"] if plan.schema else [], "objects": plan.objects,
        "columns": plan.columns, "cron jobs": plan.jobs, "migration history": plan.migrations,
    }  # fmt: skip
    say("This will be dropped:")
    for name, lines in parts.items():
        for line in lines:
            say(f"  {name:<18} {line}")
    say(f"This stays: your tags{''.join(f', {name}' for name in plan.kept)}.")
    if plan.unmarked:
        say(f"Without autotag's comment, so they stay as yours: {', '.join(plan.unmarked)}.")
    for loss in plan.losses:
        say(f"This is lost: {loss.what}.{' To keep that, first run:' if loss.keep else ''}")
        for command in loss.keep:
            say(f"  {command}")
    if plan.unfinished:
        waiting = count(plan.unfinished, "image")
        say(f"Not finished: {waiting}, whose answers are lost. Batches at the provider go on, and are billed.")
    for name in plan.yours:
        say(f"  yours              {name}{'' if name in blocked else '  (--cascade)'}")
    if any(" autotag." in name for name in blocked):
        say("What of yours is in the schema autotag can move to another one: alter table … set schema public.")
