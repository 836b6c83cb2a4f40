"""The command ``autotag``."""

from __future__ import annotations

import asyncio
from typing import Annotated

import psycopg
import psycopg_pool
import typer

import autotag
from autotag.config import SettingsError, load_settings
from autotag.logs import configure_logs
from autotag.migrate import apply_migrations
from autotag.worker import run_worker

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Tags every image of a Supabase project with a vision model.",
    pretty_exceptions_show_locals=False,
)


def _fail(message: str, code: int = 1) -> typer.Exit:
    typer.secho(f"autotag: {message}", err=True, fg=typer.colors.RED)
    return typer.Exit(code)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    """Tags every image of a Supabase project with a vision model."""
    if version:
        typer.echo(autotag.__version__)
        raise typer.Exit


@app.command()
def worker() -> None:
    """Run one worker until SIGTERM or Ctrl-C; start as many as you like.

    Reads DATABASE_URL (or SUPABASE_DB_URL), OPENAI_API_KEY, OPENAI_BASE_URL, SUPABASE_URL and
    SUPABASE_SECRET_KEY from the environment or a .env file; AUTOTAG_* for the rest (README, "Settings").
    """
    try:
        settings = load_settings()
    except SettingsError as error:
        raise _fail(str(error), 2) from None
    configure_logs(settings.log_level, settings.log_format)
    try:
        asyncio.run(run_worker(settings))
    except psycopg_pool.PoolTimeout:
        raise _fail("the database did not answer; check DATABASE_URL, its password, and the network.") from None
    except psycopg.errors.InsufficientPrivilege as error:
        raise _fail(f"{error.diag.message_primary}; grant the login role autotag_worker.") from None
    except (psycopg.errors.UndefinedFunction, psycopg.errors.InvalidSchemaName):
        raise _fail("autotag's schema is not in this database; apply its migrations first (autotag migrate).") from None


@app.command()
def migrate(
    database_url: Annotated[
        str, typer.Option(envvar=["DATABASE_URL", "SUPABASE_DB_URL"], help="The database, as its owner.")
    ],
    stand_alone: Annotated[
        bool, typer.Option(help="Also create the host's own tables (workspaces, members, assets).")
    ] = False,
) -> None:
    """Apply autotag's migrations where there is no Supabase CLI to do it."""
    try:
        applied = apply_migrations(database_url, with_host_baseline=stand_alone)
    except psycopg.Error as error:
        raise _fail(f"the migrations did not apply: {str(error).strip()}") from None
    typer.echo(f"applied: {', '.join(applied)}" if applied else "nothing to apply: the schema is up to date")


if __name__ == "__main__":
    app()
