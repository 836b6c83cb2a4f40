"""``autotag enqueue``: tags existing images."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from autotag.cli.console import count, fail, say, say_json
from autotag.cli.database import check_workspace, run_as_operator
from autotag.cli.errors import INTERRUPTED, WRONG_USAGE
from autotag.cli.options import EXIT_CODES, OPERATOR_URL, JsonWithYes, Workspace, Yes, help_end
from autotag.cli.screen import duration
from autotag.db.operator_messages import BackfillPreview
from autotag.money import dollars
from autotag.operate.backfill import Backfill, backfill
from autotag.texts import printable

MAX_IMAGES = 10_000_000
HELP_END = help_end(
    environment=[OPERATOR_URL],
    exit_codes=EXIT_CODES | {INTERRUPTED: "stopped by Ctrl-C; the message says how to go on"},
    examples=["autotag enqueue --workspace <id> --limit 5000", "autotag enqueue --workspace <id> --outdated --yes"],
)
Untagged = Annotated[
    bool, typer.Option("--untagged/--no-untagged", help="Skip images that have tags, or tag them again too.")
]
Outdated = Annotated[
    bool, typer.Option("--outdated", help="Only images that another version of the profile tagged (autotag profile).")
]
Limit = Annotated[
    int, typer.Option(metavar="NUMBER", min=1, max=MAX_IMAGES, show_default=False, help="Maximum number of images.")
]
After = Annotated[
    str | None,
    typer.Option(metavar="ID", help="Start after this image. A run that was stopped prints the id."),
]


def enqueue(
    workspace: Workspace,
    untagged: Untagged = True,
    outdated: Outdated = False,
    limit: Limit = MAX_IMAGES,
    after: After = None,
    yes: Yes = False,
    as_json: JsonWithYes = False,
) -> None:
    """Tag existing images of a workspace, after showing the cost and the time.

    Skips images that are being tagged and those that the row filter (init
    --where) leaves out, so you can run it again at any time. With --json it
    starts only if --yes is there, too; without, it prints the cost and the time.
    It waits while the workspace's limits have no room. The workers do the
    tagging; this command ends when every image is enqueued.
    """
    untagged = untagged and not outdated  # outdated images have tags
    preview = run_as_operator(
        lambda operator: operator.preview_backfill(workspace, untagged, after, limit, outdated=outdated)
    )
    if not preview["images"]:
        check_workspace(workspace, stop=True)
    if as_json and preview["images"] and not yes:
        say_json({"predicted": preview, "started": False})
        raise fail("Nothing was enqueued: it costs what `predicted` says. Add --yes to start.", WRONG_USAGE)
    if not as_json:
        if not preview["images"]:
            say("This workspace has no image to enqueue: none was tagged with an older version of the profile."
                if outdated else
                "This workspace has no image to enqueue: all have tags, are being tagged, or were tagged and nothing"
                " fitted (--no-untagged tags them again)." if untagged else
                "This workspace has no image to enqueue: there is none, or all are being tagged.")  # fmt: skip
            return
        say(f"{count(preview['images'], 'image')}, {cost_of(preview)}, about {duration(preview['seconds'])}.")
        if not yes:
            typer.confirm("Start?", abort=True)
    which = {"untagged": untagged, "outdated": outdated}
    done = _enqueue(workspace, which, limit, after, preview["images"], quiet=as_json)
    if as_json:
        say_json({"images": done.images, "jobs": done.jobs, "last": done.last, "predicted": preview, "started": True})
    else:
        say(f"{count(done.images, 'image')} in {count(done.jobs, 'upload')}. `autotag status --watch` shows them.")
        if done.images < preview["images"]:
            others = count(preview["images"] - done.images, "image")
            say(f"Skipped {others} of the preview: tagged, moved or deleted meanwhile, or enqueued by somebody else.")


def _enqueue(
    workspace: str, which: dict[str, bool], limit: int, after: str | None, expected: int, *, quiet: bool
) -> Backfill:
    """Enqueues with a progress bar.

    Raises:
        typer.Exit: Ctrl-C. The message says how to go on.
    """
    bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                   TimeRemainingColumn(), console=Console(stderr=True), disable=quiet)  # fmt: skip
    task = bar.add_task("enqueued", total=expected)
    latest = Backfill(last=after)

    def show_progress(done: Backfill, waits_for: str | None) -> None:
        nonlocal latest
        latest = done
        state = f"waiting: {printable(waits_for)}" if waits_for else "enqueued"
        bar.update(task, completed=done.images, description=state)

    try:
        with bar:
            return run_as_operator(lambda operator: backfill(
                operator, workspace, **which, after=after, limit=limit, on_progress=show_progress
            ))  # fmt: skip
    except KeyboardInterrupt:
        again = f" To go on, add --after {latest.last}." if latest.last else ""
        raise fail(f"Stopped after {count(latest.images, 'image')}.{again}", INTERRUPTED) from None


def cost_of(preview: BackfillPreview) -> str:
    """The cost that a preview predicts."""
    if preview["cost"] is None:
        return f"cost unknown (autotag.models has no price for {preview['model']})"
    return f"about {dollars(preview['cost'])}"
