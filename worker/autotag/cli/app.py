"""The command ``autotag``."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import psycopg
import psycopg_pool
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import autotag
from autotag.cli.console import Json, cell, fail, read_settings, say, say_json, tame_libraries
from autotag.cli.operate import app as operator_app
from autotag.compare.command import compare
from autotag.config import DoctorSettings, Settings, read_connection
from autotag.db import VersionsDiffer
from autotag.doctor.examine import examine
from autotag.doctor.findings import Finding, worst_level
from autotag.install.facts import Facts, look
from autotag.install.files import find_rule, users_see_files
from autotag.install.host import Choices, FileRule, Host, HostError, describe, propose
from autotag.install.migrations import (
    SPENDING_LIMIT,
    Migration,
    apply_migrations,
    project_folder,
    write_migrations,
)
from autotag.install.migrations import spending_limit as limit_spending
from autotag.observability.logs import configure_logs
from autotag.observability.traces import TracesError, configure_traces
from autotag.redact import remember_connection, said
from autotag.worker.run import run_worker

FINDING_SHOWN = 1000  # characters of what ``doctor`` says of one check
LOCAL_DATABASE = "postgresql://postgres:postgres@127.0.0.1:54322/postgres"  # what `supabase start` serves

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Tags every image of a Supabase project with a vision model.",
    pretty_exceptions_show_locals=False,
)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    """Tags every image of a Supabase project with a vision model."""
    tame_libraries()
    if version:
        typer.echo(autotag.__version__)
        raise typer.Exit


@app.command()
def worker(
    http: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Serve /healthz, /readyz and /metrics there.",
        ),
    ] = None,
    webhook: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Serve POST /webhooks/openai there, for OpenAI; needs OPENAI_WEBHOOK_SECRET.",
        ),
    ] = None,
) -> None:
    """Run one worker until SIGTERM or Ctrl-C; start as many as you like.

    Reads DATABASE_URL (or SUPABASE_DB_URL), OPENAI_API_KEY, OPENAI_BASE_URL, SUPABASE_URL and
    SUPABASE_SECRET_KEY from the environment or a .env file; AUTOTAG_* for the rest (README, "Settings").
    """
    settings = read_settings(Settings, {name: at for name, at in (("http", http), ("webhook", webhook)) if at})
    configure_logs(settings.log_level, settings.log_format)
    try:
        configure_traces()
        asyncio.run(run_worker(settings))
    except VersionsDiffer as error:
        raise fail(f"{str(error).rstrip('.')}. {error.hint}", 3) from None
    except TracesError as error:
        raise fail(str(error)) from None
    except (psycopg.OperationalError, psycopg_pool.PoolTimeout):
        raise fail("the database did not answer; check DATABASE_URL, its password, and the network.") from None
    except psycopg.errors.InsufficientPrivilege as error:
        raise fail(f"{error.diag.message_primary}; grant the login role autotag_worker.") from None
    except (psycopg.errors.UndefinedFunction, psycopg.errors.InvalidSchemaName):
        raise fail("autotag's schema is not in this database; apply its migrations first (autotag migrate).") from None
    except OSError as error:
        raise fail(f"{error.strerror or error}.") from None


# -- installing

DatabaseUrl = Annotated[
    str,
    typer.Option(
        envvar=["DATABASE_URL", "SUPABASE_DB_URL"],
        help="The project's database, as its owner (postgres), or @FILE that holds its URL. Every process list shows "
        "what stands here, so set DATABASE_URL for a URL with a password. Default: the one of supabase start.",
    ),
]
SPENDING = 20.0  # dollars that a workspace may spend a month, offered to whoever installs
SpendingOption = Annotated[
    float | None,
    typer.Option(
        "--spending-limit", metavar="DOLLARS", min=0,
        help=f"What every workspace may spend a month; 0: no limit. Asked for, with {SPENDING:g}, on a terminal.",
    ),
]  # fmt: skip
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing; what cannot be seen has to be an option.")]
TableOption = Annotated[str | None, typer.Option("--table", help="Table of the images, for example public.photos.")]
IdOption = Annotated[str | None, typer.Option("--id-column", help="Its uuid key.")]
WorkspaceOption = Annotated[str | None, typer.Option("--workspace-column", help="Its column that names the tenant.")]
PathOption = Annotated[str | None, typer.Option("--path-column", help="Its column with the path in Storage.")]
BucketOption = Annotated[str | None, typer.Option("--bucket", help="Storage bucket of images whose row names none.")]
UrlOption = Annotated[str | None, typer.Option("--url-column", help="Its column with an https URL.")]
TagsOption = Annotated[str | None, typer.Option("--tags-column", help="Its text[] or jsonb column for the tags.")]
MembersTableOption = Annotated[str | None, typer.Option("--members-table", help="Table that says who is a member.")]
FileRuleOption = Annotated[
    str | None,
    typer.Option(
        "--file-rule",
        help="Which files in Storage a row may name: workspace-folder, workspace-bucket, uploader-folder, owner, any,"
        " or a function (uuid, text, text) of yours that returns boolean.",
    ),
]
MembersClaimOption = Annotated[
    str | None, typer.Option("--members-claim", help="Claim of the JWT that does, for example app_metadata.org_ids.")
]


@app.command()
def init(
    project: Annotated[Path, typer.Argument(help="The Supabase project's folder.", file_okay=False)] = Path(),
    database_url: DatabaseUrl = LOCAL_DATABASE,
    table: TableOption = None,
    id_column: IdOption = None,
    workspace_column: WorkspaceOption = None,
    path_column: PathOption = None,
    bucket: BucketOption = None,
    url_column: UrlOption = None,
    tags_column: TagsOption = None,
    members_table: MembersTableOption = None,
    members_claim: MembersClaimOption = None,
    file_rule: FileRuleOption = None,
    spending_limit: SpendingOption = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Copy autotag's migrations into a Supabase project, fitted to its tables; then run supabase db push.

    Looks at the project's database to see which table holds the images, whose they are, where each one lies
    and where its tags go, and writes that into the migration host_adapter. Run it again at any time: files
    that are there stay as they are.
    """
    choices = Choices(
        table, id_column, workspace_column, path_column, bucket, url_column, tags_column, members_table, members_claim,
        file_rule,
    )  # fmt: skip
    try:
        folder = project_folder(project)
        database_url = _connection(database_url)
        facts, host = _look(database_url, choices, ask=not (yes or as_json))
        limit = _spending(spending_limit, facts, folder, ask=not (yes or as_json))
        files = write_migrations(folder, host, facts.applied, adapter=facts.adapter, extra=limit)
        if _stands(facts, choices):  # what it would be was not asked
            files = {name: "there" if name.endswith("host_adapter.sql") else state for name, state in files.items()}
    except HostError as error:
        raise fail(str(error), 2) from None
    found = describe(host, facts)
    if as_json:
        say_json({"folder": str(folder), "host": found, "files": files})
        return
    _show_host(found)
    for name, state in files.items():
        note = {"there": "is there already", "differs": "is there, and differs from this version"}.get(state, "written")
        say(f"  {name}  {note}")
    if not any(SPENDING_LIMIT in name for name in [*files, *facts.applied]):
        say("No limit on spending: autotag init --spending-limit 20 gives every workspace one of $20 a month.")
    if "written" in files.values():
        say(f"Next: read {next(n for n in files if n.endswith('host_adapter.sql'))}, then run: supabase db push")
    else:
        say("Nothing to write: all migrations are there.")


@app.command()
def migrate(
    database_url: DatabaseUrl = LOCAL_DATABASE,
    stand_alone: Annotated[
        bool, typer.Option(help="Also create the host's own tables (workspaces, members, assets).")
    ] = False,
    table: TableOption = None,
    id_column: IdOption = None,
    workspace_column: WorkspaceOption = None,
    path_column: PathOption = None,
    bucket: BucketOption = None,
    url_column: UrlOption = None,
    tags_column: TagsOption = None,
    members_table: MembersTableOption = None,
    members_claim: MembersClaimOption = None,
    file_rule: FileRuleOption = None,
    spending_limit: SpendingOption = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Apply autotag's migrations where there is no Supabase CLI; what is applied already is left alone."""
    choices = Choices(
        table, id_column, workspace_column, path_column, bucket, url_column, tags_column, members_table, members_claim,
        file_rule,
    )  # fmt: skip
    try:
        database_url = _connection(database_url)
        limit = []
        if stand_alone:
            host = Host()
            limit = [limit_spending(spending_limit)] if spending_limit else []
        else:
            facts, host = _look(database_url, choices, ask=not (yes or as_json))
            if not as_json and "host_adapter" not in facts.applied:
                _show_host(describe(host, facts))
            limit = _spending(spending_limit, facts, None, ask=not (yes or as_json))
        applied = apply_migrations(database_url, host=host, with_host_baseline=stand_alone, extra=limit)
    except HostError as error:
        raise fail(str(error), 2) from None
    except psycopg.Error as error:
        raise fail(f"the migrations did not apply: {str(error).strip()}") from None
    if as_json:
        say_json({"applied": applied, "version": autotag.__version__})
    else:
        say(f"applied: {', '.join(applied)}" if applied else "nothing to apply: the schema is up to date")


def _connection(value: str) -> str:
    """The connection string that an option or the environment holds, or a file (``@path``); its password is kept out
    of messages from now on."""
    try:
        url = read_connection(value)
    except ValueError as error:
        raise HostError(f"DATABASE_URL (or --database-url) {error}.") from None
    remember_connection(url)
    return url


def _stands(facts: Facts, choices: Choices) -> bool:
    """Whether the database has its adapter, and nobody asks for another one."""
    return "host_adapter" in facts.applied and choices == Choices()


def _look(url: str, choices: Choices, *, ask: bool) -> tuple[Facts, Host]:
    """What the database says, and what follows; asks on the terminal what it does not say."""
    try:
        facts = look(url)
    except psycopg.OperationalError as error:
        raise HostError(f"the database cannot be reached ({said(error)}); name it with DATABASE_URL.") from None
    if _stands(facts, choices):
        # The adapter stands and is not written again, so nobody has to answer again.
        host = propose(facts, choices, lambda _, __, answers: answers[0] if answers else "unknown")
        return facts, replace(host, files=FileRule(facts.file_rule or "none"))
    interactive = ask and sys.stdin.isatty()
    host = propose(facts, choices, _asker(interactive))
    wanted = choices.file_rule or facts.file_rule
    rule = find_rule(url, facts, host, wanted, _asker(interactive), may_ask=interactive)
    return facts, replace(host, files=rule, users_see_files=host.path is not None and users_see_files(facts, rule))


def _spending(wanted: float | None, facts: Facts, folder: Path | None, *, ask: bool) -> list[Migration]:
    """The migration that limits spending, or nothing where one is there or none is wanted."""
    if SPENDING_LIMIT in facts.applied or (folder and list(folder.glob(f"*_autotag_{SPENDING_LIMIT}.sql"))):
        return []
    if wanted is None and ask and sys.stdin.isatty() and facts.adapter is None:
        say("How many dollars may each workspace spend a month? 0: no limit. Change it at any time in autotag.quotas.")
        wanted = typer.prompt("spending-limit", default=SPENDING, type=float)
        if wanted < 0:
            raise HostError("A spending limit is 0 (none) or more dollars.")
    return [limit_spending(wanted)] if wanted else []


def _asker(interactive: bool) -> Callable[[str, str, Sequence[str]], str]:
    def ask(option: str, question: str, answers: Sequence[str]) -> str:
        if not interactive:
            among = f" (one of {', '.join(answers)})" if answers else ""
            raise HostError(f"{question} Say it with {option}{among}.")
        say(f"{question}" + (f"  [{', '.join(answers)}]" if answers else ""))
        return str(typer.prompt(option.removeprefix("--")))

    return ask


def _show_host(found: dict[str, str]) -> None:
    for what, value in found.items():
        say(f"{what + ':':<20} {value}")


# -- looking after it

app.add_typer(operator_app)
app.command()(compare)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check the whole installation and say what mends each finding.

    Reads the same environment as the worker. Exit code: 0 all well, 1 warnings, 2 errors.
    """
    settings = read_settings(DoctorSettings, {})
    configure_logs("error", "console")
    findings = asyncio.run(examine(settings))
    worst = worst_level(findings)
    if as_json:
        say_json({"worst": worst, "findings": [f.__dict__ for f in findings]})
    else:
        Console().print(_findings(findings))
    raise typer.Exit({"ok": 0, "warning": 1, "error": 2}[worst])


def _findings(findings: list[Finding]) -> Table:
    looks = {"ok": "green", "warning": "yellow", "error": "red"}
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("check", "", "finding"):
        shown.add_column(column, overflow="fold")
    for finding in findings:
        told = cell(finding.message, length=FINDING_SHOWN)
        if finding.fix:
            told = Text.assemble(told, "\n", cell(f"→ {finding.fix}", "bold", FINDING_SHOWN))
        shown.add_row(cell(finding.check), Text(finding.level, looks[finding.level]), told)
    return shown


if __name__ == "__main__":
    app()
