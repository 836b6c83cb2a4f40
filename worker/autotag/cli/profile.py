"""``autotag profile``: shows and changes what the images of a workspace are asked."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from autotag.cli.console import count, fail, say, say_json
from autotag.cli.database import check_workspace, run_as_operator
from autotag.cli.enqueue import MAX_IMAGES, cost_of
from autotag.cli.errors import WRONG_USAGE
from autotag.cli.options import OPERATOR_URL, Json, finite, help_end
from autotag.db import Operator
from autotag.db.operator_messages import BackfillPreview
from autotag.db.profiles import Profile, ProfileChanges
from autotag.operate.profile_file import SETTINGS, read_profile, whole_profile, write_profile

HELP_END = help_end(
    environment=[OPERATOR_URL, ("EDITOR", "the editor of autotag profile edit")],
    examples=[
        "autotag profile show --workspace <id>",
        "autotag profile set --workspace <id> --language German --tag-count 8",
        "autotag profile set --all --file profile.toml",
    ],
)


DEFAULTS: dict[str, Any] = {
    "instructions": "", "language": None, "tag_count": None, "min_confidence": 0, "vocabulary_mode": "open",
    "add_parents": False, "fields": [],
}  # fmt: skip


class Action(StrEnum):
    """What to do with the profile."""

    show = "show"
    set = "set"
    edit = "edit"
    history = "history"


_CHANGES = "Changes (for autotag profile set; everything else stays)"
Doing = Annotated[Action, typer.Argument(help="show it, set parts of it, edit it as TOML, or list its versions.")]
OneWorkspace = Annotated[
    str | None, typer.Option("--workspace", metavar="ID", show_default=False, help="The workspace's id.")
]
All = Annotated[bool, typer.Option("--all", help="The profile of all workspaces that have none of their own.")]
Instructions = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="What to look for and how to word it; '' removes it.", rich_help_panel=_CHANGES),
]
Language = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Language of tags and caption; '' removes it.", rich_help_panel=_CHANGES),
]
TagCount = Annotated[int | None, typer.Option(help="Number of tags, 1 to 50.", rich_help_panel=_CHANGES)]
MinConfidence = Annotated[
    float | None,
    typer.Option(
        metavar="NUMBER",
        min=0,
        max=1,
        callback=finite,
        help="Less sure tags are not stored, 0 to 1.",
        rich_help_panel=_CHANGES,
    ),
]
VocabularyMode = Annotated[
    str | None, typer.Option(metavar="MODE", help="open, prefer or only.", rich_help_panel=_CHANGES)
]
AddParents = Annotated[
    bool | None,
    typer.Option("--add-parents/--no-add-parents", help="Store the parents of a tag, too.", rich_help_panel=_CHANGES),
]
File = Annotated[
    Path | None,
    typer.Option("--file", exists=True, dir_okay=False, help="TOML or JSON (.json) with changes, also of the fields.",
                 rich_help_panel=_CHANGES),
]  # fmt: skip


def profile(
    action: Doing,
    workspace: OneWorkspace = None,
    for_all: All = False,
    instructions: Instructions = None,
    language: Language = None,
    tag_count: TagCount = None,
    min_confidence: MinConfidence = None,
    vocabulary_mode: VocabularyMode = None,
    add_parents: AddParents = None,
    file: File = None,
    as_json: Json = False,
) -> None:
    """Show or change what the images of a workspace are asked.

    A change makes a new version, which applies to later uploads. Images
    that were tagged before stay as they are; set and edit say how many, and what
    it costs to tag them again (autotag enqueue --outdated).
    """
    if (workspace is None) != for_all:
        raise fail("Name a workspace with --workspace, or --all.", WRONG_USAGE)
    options: dict[str, object] = {
        "instructions": instructions, "language": language, "tag_count": tag_count,
        "min_confidence": min_confidence, "vocabulary_mode": vocabulary_mode, "add_parents": add_parents,
    }  # fmt: skip
    changes = _changes(options, file)
    if bool(changes) != (action is Action.set):
        raise fail("Name what to change, for example --language German; autotag profile edit shows it all."
                   if action is Action.set else f"autotag profile {action} takes no changes.", WRONG_USAGE)  # fmt: skip
    check_workspace(workspace, stop=False)
    if action is Action.history:
        _show_history(run_as_operator(lambda operator: operator.profile_history(workspace)), as_json)
        return
    old = run_as_operator(lambda operator: operator.profile(workspace))
    if action is Action.show:
        _show(old, None if workspace is None else _outdated(workspace), workspace, as_json)
        return
    if action is Action.edit:
        changes = _edited(old)
    new = run_as_operator(lambda operator: operator.set_profile(workspace, changes))
    _show_change(old, new, None if workspace is None else _outdated(workspace), workspace, as_json)
    if new["vocabulary_mode"] == "only" and not as_json and not new["has_vocabulary"]:
        say("The vocabulary is empty, so no tag will be stored. Next: autotag vocabulary import tags.csv")


def _changes(options: dict[str, object], file: Path | None) -> ProfileChanges:
    """The changes that a file and options name; options override the file. An empty text removes a value."""
    named = {name: value if value != "" else None for name, value in options.items() if value is not None}
    try:
        from_file = read_profile(file) if file else {}
    except (ValueError, OSError) as error:
        raise fail(f"{file} cannot be read as a profile: {error}", WRONG_USAGE) from None
    return cast("ProfileChanges", {**from_file, **named})


def _edited(old: Profile) -> ProfileChanges:
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile.toml"
        file.write_text(write_profile(old), "utf-8")
        try:
            subprocess.run([*shlex.split(editor), str(file)], check=True)  # noqa: S603  the caller's own editor
            return whole_profile(file.read_text("utf-8"))
        except (OSError, subprocess.CalledProcessError) as error:
            raise fail(f"The editor failed, so nothing was saved: {error}") from None
        except ValueError as error:
            raise fail(f"This is not a profile in TOML, so nothing was saved: {error}", WRONG_USAGE) from None


def _outdated(workspace: str) -> BackfillPreview:
    async def preview(operator: Operator) -> BackfillPreview:
        return await operator.preview_backfill(workspace, False, None, MAX_IMAGES, outdated=True)

    return run_as_operator(preview)


def _show(shown: Profile, outdated: BackfillPreview | None, workspace: str | None, as_json: bool) -> None:
    if as_json:
        say_json({**shown, "outdated": outdated})
        return
    whose = "the workspace's own" if shown["own"] else "the one for all workspaces"
    say("Nobody has saved a profile; this is the default." if not shown["version"] else
        f"Version {shown['version']}, {whose}, of {_date(shown['created_at'])}.")  # fmt: skip
    for name in (*SETTINGS, "fields"):
        say(f"{name + ':':<17} {_text(cast('dict[str, Any]', shown)[name])}")
    _say_outdated(outdated, workspace)


def _show_change(
    old: Profile, new: Profile, outdated: BackfillPreview | None, workspace: str | None, as_json: bool
) -> None:
    before, after = cast("dict[str, Any]", old), cast("dict[str, Any]", new)
    changed = [name for name in (*SETTINGS, "fields") if before[name] != after[name]]
    if as_json:
        say_json({**new, "changed": changed, "outdated": outdated})
        return
    for name in changed:
        say(f"{name}: {_text(before[name])} → {_text(after[name])}")
    say(f"Version {new['version']} holds from now on." if changed else
        f"Nothing changes; version {new['version']} holds.")  # fmt: skip
    _say_outdated(outdated, workspace)


def _say_outdated(outdated: BackfillPreview | None, workspace: str | None) -> None:
    if outdated and outdated["images"]:
        say(
            f"{count(outdated['images'], 'image')} tagged with an older version; again costs {cost_of(outdated)}:"
            f" autotag enqueue --workspace {workspace} --outdated"
        )


def _show_history(versions: list[Profile], as_json: bool) -> None:
    if as_json:
        say_json(versions)
        return
    if not versions:
        say("There is no version yet.")
        return
    for newer, older in zip(versions, [*versions[1:], None], strict=True):
        now, before = cast("dict[str, Any]", newer), cast("dict[str, Any]", older or {})
        names = [name for name in (*SETTINGS, "fields") if now[name] != before.get(name, DEFAULTS[name])]
        changed = [f"{name}: {_text(now[name])}" for name in names]
        say(f"{newer['version']:>4}  {_date(newer['created_at'])}  {'; '.join(changed) or 'as by default'}")


def _date(moment: str | None) -> str:
    """A time for people: 2026-12-01 09:30 UTC."""
    return f"{datetime.fromisoformat(moment).astimezone(UTC):%Y-%m-%d %H:%M} UTC" if moment else ""


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{field['name']} ({field['kind']})" for field in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value in (None, "") else str(value)
