"""``autotag init``: writes the migrations into a project of the Supabase CLI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from autotag.cli import options
from autotag.cli.console import say, say_json
from autotag.cli.errors import LOCAL_DATABASE, explain_install_errors
from autotag.cli.questions import ask_spending_limit, on_terminal, say_examples, say_index, show_host, survey_project
from autotag.install.changes import CHANGE
from autotag.install.described import describe
from autotag.install.host import Choices
from autotag.install.migrations import SPENDING_LIMIT, project_folder, write_migrations
from autotag.install.origin import push_command
from autotag.install.preview import show_examples
from autotag.install.survey import Survey, plan_extra, plan_spending_limit
from autotag.install.tag_index import offer_index
from autotag.install.written import HOST_ADAPTER

HELP_END = options.help_end(
    environment=[options.OWNER_URL],
    dotenv=False,
    examples=[
        "autotag init", "autotag init ../shop --table public.photos --spending-limit 20",
        "DATABASE_URL=@/run/secrets/owner_url autotag init --yes --json",
    ],
)  # fmt: skip
STATES = {"written": "written", "there": "is there already", "differs": "is there, and differs from this version"}

Project = Annotated[Path, typer.Argument(help="The Supabase project's folder.", file_okay=False)]


@options.with_choices
def init(
    project: Project = Path(),
    database_url: options.DatabaseUrl = LOCAL_DATABASE,
    choices: Choices = Choices(),  # noqa: B008 - the decorator replaces it by options
    spending_limit: options.SpendingLimit = None,
    yes: options.AskNothing = False,
    as_json: options.JsonAskingNothing = False,
) -> None:
    """Write autotag's migrations into a Supabase project, fitted to its tables.

    Reads from the project's database which table holds the images, who may see
    them, where each file is and where its tags go. Asks what it cannot read.
    It writes the answers into the migration host_adapter.

    Run it again at any time: it never overwrites a file. With other options it
    writes a migration that changes the adapter; what you do not name stays.
    Afterwards run supabase db push, which applies the migrations: to the local
    stack, or with --remote to the linked project.
    """
    interactive = on_terminal() and not (yes or as_json)
    url = options.read_database_url(database_url)
    with explain_install_errors(url):
        folder = project_folder(project)
        found = survey_project(url, choices, interactive=interactive, folder=folder)
        examples = show_examples(url, found)
        host = describe(found.host, found.facts)
        if not as_json:
            _show_survey(found, host, examples)
        ask_limit = ask_spending_limit if interactive else None
        limit = plan_spending_limit(spending_limit, found.facts, folder, ask_limit)
        extra = [*plan_extra(found), *limit]
        files = write_migrations(folder, found.host, found.facts.applied, adapter=found.facts.adapter, extra=extra)
    # the adapter's file never changes, so new answers become a migration of their own
    if found.facts.adapter is not None:
        files = {name: "there" if name.endswith(f"{HOST_ADAPTER}.sql") else state for name, state in files.items()}
    index = offer_index(found.host, found.facts)
    if as_json:
        say_json({
            "folder": str(folder), "host": host, "examples": None if isinstance(examples, str) else examples,
            "no_examples": examples if isinstance(examples, str) else None, "notes": found.notes, "files": files,
            "tag_index": asdict(index),
        })  # fmt: skip
    else:
        _show_files(files, found.facts.applied, push_command(url))
        say_index(index)


def _show_survey(found: Survey, host: Mapping[str, str], examples: Sequence[Mapping[str, Any]] | str) -> None:
    """Prints what was found, before anything is written."""
    if found.keeps_adapter:
        say(f"The database has its host adapter (file rule {found.host.files.name}); it stays as it is.")
        for note in found.notes:
            say(note)
    else:
        show_host(host)
        say_examples(examples, found.notes)


def _show_files(files: Mapping[str, str], applied: Sequence[str] | Mapping[str, str], push: str) -> None:
    """Prints what happened to each file, and the next step."""
    for name, state in files.items():
        say(f"  {name}  {STATES[state]}")
    if not any(SPENDING_LIMIT in name for name in [*files, *applied]):
        say("No limit on spending: autotag init --spending-limit 20 limits every workspace to $20 a month.")
    if "written" in files.values():
        written = [name for name, state in files.items() if state == "written"]
        adapter = next((name for name in written if HOST_ADAPTER in name or CHANGE in name), written[0])
        say(f"Next: read {adapter}, then run: {push}")
    else:
        say("Nothing to write: all migrations are there.")
