"""What ``autotag init`` and ``autotag migrate`` ask and show on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import typer

from autotag.cli.console import say
from autotag.cli.options import OFFERED_SPENDING_LIMIT
from autotag.install.answers import Ask
from autotag.install.survey import refuse_to_ask


def on_terminal() -> bool:
    """Whether a person can answer."""
    return sys.stdin.isatty()


def answerer(interactive: bool) -> Ask:
    """What answers the questions of a survey: a person, or an error that names the option."""
    return _ask if interactive else refuse_to_ask


def _ask(option: str, question: str, answers: Sequence[str]) -> str:
    say(question + (f"  [{', '.join(answers)}]" if answers else ""))
    return str(typer.prompt(option.removeprefix("--")))


def ask_spending_limit() -> float:
    """Asks for dollars a month; 0: no limit."""
    say("How many dollars may each workspace spend a month? 0: no limit. Change it at any time in autotag.quotas.")
    return float(typer.prompt("spending-limit", default=OFFERED_SPENDING_LIMIT, type=float))


def show_host(found: Mapping[str, str]) -> None:
    """Prints what a survey found: a line for each fact."""
    for name, value in found.items():
        say(f"{name + ':':<20} {value}")
