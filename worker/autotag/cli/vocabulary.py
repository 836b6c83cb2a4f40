"""``autotag vocabulary``: imports and exports the tags that a workspace uses."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from autotag.cli.console import count, fail, say, say_json
from autotag.cli.database import check_workspace, run_as_operator
from autotag.cli.errors import FAILED, WRONG_USAGE
from autotag.cli.options import OPERATOR_URL, Json, help_end
from autotag.db import Operator, Refused
from autotag.db.errors import Refusal
from autotag.db.vocabulary import Entry, UsesCounted, VocabularyChange
from autotag.operate.count_tags import count_tags
from autotag.operate.vocabulary_file import FileError, VocabularyFile, read_vocabulary, write_csv
from autotag.texts import name_some, printable

PROMPT_TAGS = 500  # autotag.vocabulary_for_prompt
HELP_END = help_end(
    environment=[OPERATOR_URL],
    examples=[
        "autotag vocabulary import tags.csv --workspace <id> --dry-run",
        "autotag vocabulary import --from-tags --min-count 5 --workspace <id>",
        "autotag vocabulary export --workspace <id> > tags.csv",
        "autotag profile set --workspace <id> --vocabulary-mode only",
    ],
)


class Action(StrEnum):
    """What to do with the vocabulary."""

    imports = "import"
    export = "export"


Doing = Annotated[Action, typer.Argument(help="import a file or what images have; export as CSV, or --json.")]
File = Annotated[
    Path | None, typer.Argument(help="CSV, or a list with one tag a line; - reads standard input.", allow_dash=True)
]
OneWorkspace = Annotated[
    str | None,
    typer.Option("--workspace", metavar="ID", show_default=False,
                 help="The workspace's id. Default: the vocabulary of all workspaces."),
]  # fmt: skip
FromTags = Annotated[bool, typer.Option("--from-tags", help="Import the tags that the images have, with their counts.")]
MinCount = Annotated[
    int, typer.Option(min=1, metavar="NUMBER", help="For --from-tags: only tags that so many images have.")
]
ForAll = Annotated[
    bool,
    typer.Option("--visible-to-all", help="For --from-tags without --workspace: all members may see them."),
]
ReplaceAll = Annotated[bool, typer.Option("--replace", help="Remove the tags that the file lacks.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")]


def vocabulary(
    action: Doing,
    file: File = None,
    workspace: OneWorkspace = None,
    from_tags: FromTags = False,
    min_count: MinCount = 1,
    visible_to_all: ForAll = False,
    replace: ReplaceAll = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Import or export the tags that a workspace uses.

    A file has the columns tag, aliases (separated by | or ;), description and
    parent; a header is optional, and so are all columns but the first. CSV of
    any spreadsheet is read. If one line is wrong, nothing is imported. What a
    file does not have stays as it is.

    What the tags are used for is a part of the profile: autotag profile set
    --vocabulary-mode prefer (the model prefers them) or only (no other tag is
    stored).

    Members of every workspace see the vocabulary of all workspaces. So without
    --workspace, --from-tags shows the tags that it would take from images of
    some for all to see, and adds them only with --visible-to-all.
    """
    check_workspace(workspace, stop=False)
    if action is Action.export:
        if file or from_tags or replace or dry_run:
            raise fail("export takes only --workspace and --json; redirect its output to a file.", WRONG_USAGE)
        _export(workspace, as_json)
        return
    if (file is None) != from_tags:
        raise fail("Name a file to import, or --from-tags.", WRONG_USAGE)
    if from_tags:
        if replace:
            raise fail("--from-tags only adds tags, so you cannot combine it with --replace.", WRONG_USAGE)
        _import_from_tags(workspace, min_count, dry_run, visible_to_all or workspace is not None, as_json)
    elif file:
        _import_file(file, workspace, replace, dry_run, as_json)


def _import_file(path: Path, workspace: str | None, replace: bool, dry_run: bool, as_json: bool) -> None:
    found = _read(path)
    if found.encoding and not as_json:
        say(f"The file is not in UTF-8; it was read as {found.encoding}.", err=True)

    if found.first_row and not as_json:
        say(
            f"Line 1 counts as a tag ({printable(found.first_row, 60)}). If it is a header, name its columns tag,"
            " aliases, description and parent.", err=True,
        )  # fmt: skip

    if found.commas and not as_json:
        place, alias = found.commas
        say(f"{place.capitalize()}: {printable(alias, 60)} is one alias. Separate aliases by | or ;", err=True)

    async def work(operator: Operator) -> VocabularyChange:
        try:
            return await operator.edit_vocabulary(workspace, found.entries, replace=replace, dry_run=dry_run)
        except Refused as refused:
            places = _places(found, refused.detail)
            raise fail(f"{places}{refused} {refused.hint or ''}".strip(), FAILED) from None

    with _progress(as_json) as bar:
        bar.add_task(f"importing {count(len(found.entries), 'tag')}", total=None)
        done = run_as_operator(work)
    if as_json:
        say_json({**done, "dry_run": dry_run})
        return
    would = "would be " if dry_run else ""
    say(f"{count(done['added'], 'tag')} {would}added, {done['changed']:,} changed, {done['removed']:,} removed;"
        f" the vocabulary {'would have' if dry_run else 'has'} {count(done['tags'], 'tag')}.")  # fmt: skip
    _say_more(done["tags"])


def _read(path: Path) -> VocabularyFile:
    """Reads a file, or standard input.

    Raises:
        typer.Exit: it cannot be read. The message has been printed.
    """
    try:
        return read_vocabulary(sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes())
    except OSError as error:
        raise fail(f"{path} cannot be read ({error.strerror}).", WRONG_USAGE) from None
    except FileError as error:
        raise fail(f"{error} Nothing was imported.", FAILED) from None


def _places(found: VocabularyFile, detail: Refusal) -> str:
    """Where the entries of a refusal are in the file, to begin the message with."""
    places: Sequence[str] = []
    with suppress(KeyError, IndexError, TypeError):
        places = [found.places[int(detail["entry"]) - 1]]
    if not places and "name" in detail:
        places = found.find(str(detail["name"]))
    text = name_some(places, 5)
    return f"{text[0].upper()}{text[1:]}: " if text else ""


def _import_from_tags(workspace: str | None, min_count: int, dry_run: bool, may_add: bool, as_json: bool) -> None:
    """may_add: everybody who sees the vocabulary may see the tags of these images."""
    with _progress(as_json) as bar:
        task = bar.add_task("counting images", total=None)

        def show(images: int, tags: int) -> None:
            bar.update(task, completed=images, description=f"{count(tags, 'tag')} of images")

        async def work(operator: Operator) -> tuple[Counter[str], UsesCounted]:
            counts = await count_tags(operator, workspace, show)
            if not may_add and not dry_run:
                _refuse_to_show((await operator.count_uses(None, counts, min_count, dry_run=True))["new"])
            return counts, await operator.count_uses(workspace, counts, min_count, dry_run=dry_run)

        counts, done = run_as_operator(work)
    if as_json:
        say_json({**done, "dry_run": dry_run, "counts": dict(counts.most_common())})
        return
    would = "would be " if dry_run else ""
    shown = [(new["tag"], new["uses"]) for new in done["new"]] if workspace is None else counts.most_common(10)
    for tag, images in shown:
        say(f"{images:>9,}  {printable(tag, 60)}")
    say(f"{count(len(counts), 'tag')} found, {done['added']:,} {would}added, {done['counted']:,} counted;"
        f" the vocabulary {'would have' if dry_run else 'has'} {count(done['tags'], 'tag')}.")  # fmt: skip
    _say_more(done["tags"])


def _refuse_to_show(new: Sequence[Entry]) -> None:
    """Refuses to add tags of images to the general vocabulary, which members of every workspace see.

    Raises:
        typer.Exit: there are new tags. They have been printed.
    """
    if new:
        for entry in new:
            say(f"{entry['uses']:>9,}  {printable(entry['tag'], 60)}", err=True)
        raise fail(
            f"Members of all workspaces would see {count(len(new), 'tag')}, also those of images of one workspace alone"
            " (names of people or projects, for example). Nothing was imported. If all may see the list above, repeat"
            " the command with --visible-to-all; otherwise name one --workspace, or a higher --min-count.", FAILED,
        )  # fmt: skip


def _say_more(tags: int) -> None:
    if tags > PROMPT_TAGS:
        say(
            f"The prompt has the {PROMPT_TAGS} tags that most images have (import --from-tags counts); all are matched."
        )


def _export(workspace: str | None, as_json: bool) -> None:
    entries = run_as_operator(lambda operator: operator.list_vocabulary(workspace))
    if as_json:
        say_json(entries)
    else:
        sys.stdout.buffer.write(write_csv(entries).encode())  # UTF-8, whatever the terminal's encoding is
        sys.stdout.buffer.flush()


def _progress(quiet: bool) -> Progress:
    return Progress(SpinnerColumn(), TextColumn("{task.description}", markup=False), MofNCompleteColumn(),
                    console=Console(stderr=True), disable=quiet, transient=True)  # fmt: skip
