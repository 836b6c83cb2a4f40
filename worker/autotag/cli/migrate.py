"""``autotag migrate``: applies the migrations without the Supabase CLI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

import autotag
from autotag.cli import options
from autotag.cli.console import say, say_json
from autotag.cli.errors import LOCAL_DATABASE, explain_install_errors
from autotag.cli.questions import ask_spending_limit, on_terminal, show_host, survey_project
from autotag.install import migrations
from autotag.install.described import describe
from autotag.install.facts import read_facts
from autotag.install.host import Choices, HostError
from autotag.install.survey import plan_extra, plan_spending_limit
from autotag.install.written import HOST_ADAPTER, Written, written_migrations

HELP_END = options.help_end(
    environment=[options.OWNER_URL],
    dotenv=False,
    examples=["autotag migrate", "autotag migrate --table public.photos", "autotag migrate --stand-alone"],
)
Project = Annotated[
    Path | None,
    typer.Argument(help="The Supabase project's folder. (default: the one that you are in, if any)", file_okay=False),
]
StandAlone = Annotated[
    bool,
    typer.Option(
        "--stand-alone",
        help="For an empty Supabase project: also create the tables workspaces, workspace_members and assets, and the"
        " private bucket assets.",
    ),
]


@options.with_choices
def migrate(
    project: Project = None,
    database_url: options.DatabaseUrl = LOCAL_DATABASE,
    stand_alone: StandAlone = False,
    choices: Choices = Choices(),  # noqa: B008 - the decorator replaces it by options
    spending_limit: options.SpendingLimit = None,
    yes: options.AskNothing = False,
    as_json: options.JsonAskingNothing = False,
) -> None:
    """Apply autotag's migrations to a database, where there is no Supabase CLI.

    In a Supabase project for which autotag init has written files, it applies
    these files as they stand, with your edits. Elsewhere it reads the
    project's tables as autotag init does, and takes the same options.
    Migrations that the database has already, from this command or from
    supabase db push, are skipped.
    """
    url = options.read_database_url(database_url)
    notes: Sequence[str] = ()
    with explain_install_errors(url):
        files = {} if stand_alone else _files(project)
        if files:
            _refuse_options(files, choices, spending_limit)
            if not as_json:
                say(f"Applying the files of autotag in {files[min(files)].path.parent}, as they stand.")
            applied = migrations.apply_written(url, files)
        elif stand_alone:
            limit = plan_spending_limit(spending_limit, read_facts(url), None, None)
            applied = migrations.apply_migrations(url, with_host_baseline=True, extra=limit)
        else:
            interactive = on_terminal() and not (yes or as_json)
            applied, notes = _apply_answers(url, choices, spending_limit, interactive=interactive, quiet=as_json)
    if as_json:
        say_json({"applied": applied, "version": autotag.__version__, "notes": notes})
        return
    say(f"Applied: {', '.join(applied)}." if applied else "Nothing to apply: the schema is up to date.")
    if applied:
        say("Next: run autotag doctor, which says what is still missing.")


def _apply_answers(
    url: str, choices: Choices, spending_limit: float | None, *, interactive: bool, quiet: bool
) -> tuple[list[str], Sequence[str]]:
    """Applies the migrations that `autotag init` would write. Returns their names, and notes for a person."""
    found = survey_project(url, choices, interactive=interactive)
    if not quiet and (HOST_ADAPTER not in found.facts.applied or found.change):
        show_host(describe(found.host, found.facts))
        for note in found.notes:
            say(note)
    ask_limit = ask_spending_limit if interactive else None
    limit = plan_spending_limit(spending_limit, found.facts, None, ask_limit)
    extra = [*plan_extra(found), *limit]
    return migrations.apply_migrations(url, host=found.host, extra=extra), found.notes


def _files(project: Path | None) -> Mapping[str, Written]:
    """The files that `autotag init` has written into the project; empty if this is not a project's folder."""
    try:
        folder = migrations.project_folder(project or Path())
    except HostError:
        if project is None:
            return {}
        raise
    return written_migrations(folder)


def _refuse_options(files: Mapping[str, Written], choices: Choices, spending_limit: float | None) -> None:
    """Refuses options, because the files already contain the answers.

    Raises:
        HostError: an option was given.
    """
    if choices != Choices() or spending_limit is not None:
        raise HostError(
            f"{files[min(files)].path.parent} has files of autotag, which this command applies as they stand; give the"
            " options to autotag init, which writes them into a file, and run autotag migrate without them."
        )
