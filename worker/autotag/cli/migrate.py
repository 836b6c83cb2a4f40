"""``autotag migrate``: applies the migrations without the Supabase CLI."""

from __future__ import annotations

from typing import Annotated

import typer

import autotag
from autotag.cli import options
from autotag.cli.console import say, say_json
from autotag.cli.errors import LOCAL_DATABASE, explain_install_errors
from autotag.cli.questions import answerer, ask_spending_limit, on_terminal, show_host
from autotag.install import migrations
from autotag.install.host import Choices, Host, describe
from autotag.install.survey import plan_spending_limit, survey

HELP_END = options.help_end(
    environment=[options.OWNER_URL],
    dotenv=False,
    examples=["autotag migrate --table public.photos", "autotag migrate --stand-alone"],
)
StandAlone = Annotated[
    bool, typer.Option("--stand-alone", help="Also create the tables of the images: workspaces, members, assets.")
]


@options.with_choices
def migrate(
    database_url: options.DatabaseUrl = LOCAL_DATABASE,
    stand_alone: StandAlone = False,
    choices: Choices = Choices(),  # noqa: B008 - the decorator replaces it by options
    spending_limit: options.SpendingLimit = None,
    yes: options.AskNothing = False,
    as_json: options.JsonAskingNothing = False,
) -> None:
    """Apply autotag's migrations to a database, where there is no Supabase CLI.

    Reads the project's tables as autotag init does. Migrations that the
    database has already, from this command or from supabase db push, are
    skipped.
    """
    url = options.read_database_url(database_url)
    interactive = on_terminal() and not (yes or as_json)
    notes: tuple[str, ...] = ()
    with explain_install_errors(url):
        if stand_alone:
            host = Host()
            limit = [migrations.spending_limit(spending_limit)] if spending_limit else []
        else:
            found = survey(url, choices, answerer(interactive), may_ask=interactive)
            host = found.host
            notes = found.notes
            if not as_json and (migrations.HOST_ADAPTER not in found.facts.applied or found.change):
                show_host(describe(host, found.facts))
                for note in notes:
                    say(note)
            ask_limit = ask_spending_limit if interactive else None
            limit = [*filter(None, [found.change]), *plan_spending_limit(spending_limit, found.facts, None, ask_limit)]
        applied = migrations.apply_migrations(url, host=host, with_host_baseline=stand_alone, extra=limit)
    if as_json:
        say_json({"applied": applied, "version": autotag.__version__, "notes": notes})
        return
    say(f"Applied: {', '.join(applied)}." if applied else "Nothing to apply: the schema is up to date.")
    if applied:
        say("Next: run autotag doctor, which says what is still missing.")
