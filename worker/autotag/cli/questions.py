"""The questions and answers of ``autotag init`` and ``autotag migrate`` on a terminal."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from autotag.cli.console import say
from autotag.cli.options import OFFERED_SPENDING_LIMIT
from autotag.install.answers import Choices, HostError
from autotag.install.survey import Survey, survey, survey_alone
from autotag.install.tag_index import TagIndex

#: Why a row is refused -> the message for a person.
REFUSED = {
    "foreign_file": "refused: the file rule does not let it name this file",
    "location_too_long": "refused: its location is too long",
    "filtered": "left out by --where",
}


def on_terminal() -> bool:
    """Whether a person can answer."""
    return sys.stdin.isatty()


def _ask(option: str, question: str, answers: Sequence[str]) -> str:
    say(question + (f"  [{', '.join(answers)}]" if answers else ""))
    return str(typer.prompt(option.removeprefix("--")))


def survey_project(url: str, choices: Choices, *, interactive: bool, folder: Path | None = None) -> Survey:
    """Surveys a project (`install.survey`). If an answer cannot be used, the person is asked again.

    Raises:
        HostError: the tables or an option cannot be used, or a question has no answer.
        psycopg.OperationalError: the database cannot be reached.
    """
    if not interactive:
        return survey_alone(url, choices, folder)
    answers: dict[str, str] = {}

    def ask_once(option: str, question: str, possible: Sequence[str]) -> str:
        if option not in answers:
            answers[option] = _ask(option, question, possible)
        return answers[option]

    while True:
        try:
            return survey(url, choices, ask_once, may_ask=True, folder=folder)
        except HostError as error:
            wrong = [option for option in answers if re.search(rf"{option}(?![\w-])", str(error))]
            if not wrong:
                raise
            say(str(error))
            del answers[wrong[-1]]


def ask_spending_limit() -> float:
    """Asks for dollars a month; 0: no limit."""
    say("How many dollars may each workspace spend a month? 0: no limit. Change it at any time in autotag.quotas.")
    return float(typer.prompt("spending-limit", default=OFFERED_SPENDING_LIMIT, value_proc=_dollars))


def _dollars(text: Any) -> float:
    """An amount that somebody typed. nan would be a limit that nothing exceeds."""
    try:
        amount = float(text)
    except ValueError:
        amount = -1
    if not (math.isfinite(amount) and amount >= 0):
        raise typer.BadParameter("Type an amount in dollars, or 0.")
    return amount


def show_host(found: Mapping[str, str]) -> None:
    """Prints what a survey found: a line for each fact."""
    for name, value in found.items():
        say(f"{name + ':':<20} {value}")


def say_examples(examples: Sequence[Mapping[str, Any]] | str, notes: Sequence[str]) -> None:
    """Prints the adapter's answers for a few rows, and notes for a person."""
    for note in notes:
        say(note)
    if isinstance(examples, str):
        say(f"What the adapter answers for your rows is not shown: {examples}.")
        return
    if not examples:
        say("The table has no rows yet that would be tagged, so there is no example to show.")
    else:
        say("Please check what the adapter answers for these rows:")
    for example in examples:
        where = example["image"] or REFUSED.get(example["refused"], "nowhere: the row names no file or URL")
        say(f"  image {example['id']}")
        say(f"    who may tag it:   {example['who']}")
        say(f"    where it is:      {where}")
        say(f"    tags:             {example['tags'] or 'none'}")


def say_index(index: TagIndex) -> None:
    """Prints the statement for the index for searching by tag, if the index is missing."""
    if index.statement:
        say("To search by tag, create this index afterwards, with psql (it cannot run in a migration):")
        say(f"  {index.statement}")
    if index.note:
        say(index.note)
