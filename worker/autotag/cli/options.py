"""Code that the commands share: options, settings from the environment, and the last part of each help page."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from rich.markup import escape

from autotag.cli.console import fail, note_json
from autotag.cli.errors import WRONG_USAGE
from autotag.config import Settings, SettingsError, load_settings, read_connection
from autotag.install.host import Choices
from autotag.redact import remember_connection

S = TypeVar("S", bound=Settings)

OFFERED_SPENDING_LIMIT = 20.0  # dollars a month


def finite(value: float | None) -> float | None:
    """The callback of every option with a fraction: ``nan`` and ``inf`` are numbers to Python, but not to JSON."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number that can be stored; name one like 0.5.")
    return value


Json = Annotated[bool, typer.Option("--json", callback=note_json, help="Print JSON instead of text.")]
#: For commands that spend money.
JsonWithYes = Annotated[
    bool, typer.Option("--json", callback=note_json, help="Print JSON instead of text. Starts only with --yes.")
]
JsonAskingNothing = Annotated[
    bool, typer.Option("--json", callback=note_json, help="Print JSON instead of text, and ask nothing.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Start without asking.")]
Workspace = Annotated[str, typer.Option("--workspace", metavar="ID", help="The workspace's id.")]

# -- the options of init and migrate

AskNothing = Annotated[
    bool, typer.Option("--yes", "-y", help="Ask nothing. What the database does not show must be an option.")
]
DatabaseUrl = Annotated[
    str,
    typer.Option(
        metavar="URL",
        envvar=["AUTOTAG_DATABASE_URL", "SUPABASE_DB_URL", "DATABASE_URL"],
        show_envvar=False,
        show_default=False,
        help="The project's database, with the owner's login (postgres); or @FILE, which holds the URL. Other users of"
        " this machine can read a password in an option, so prefer the variable. Default: the local stack of supabase"
        " start.",
    ),
]


SpendingLimit = Annotated[
    float | None,
    typer.Option(
        metavar="DOLLARS", min=0, callback=finite,
        help="What each workspace may spend a month; 0: no limit. Default: asked on a terminal"
        f" ({OFFERED_SPENDING_LIMIT:g}), otherwise no limit.",
    ),
]  # fmt: skip

_TABLES = "Your tables (default: what the database shows)"


def _host_option(name: str, text: str, metavar: str = "NAME") -> Any:
    return typer.Option(name, metavar=metavar, help=text, rich_help_panel=_TABLES)


Table = Annotated[str | None, _host_option("--table", "Table of the images, for example public.photos.")]
IdColumn = Annotated[
    str | None, _host_option("--id-column", "Its key: a uuid, bigint, integer or text that is unique by itself.")
]
WorkspaceColumn = Annotated[
    str | None, _host_option("--workspace-column", "Its column with the workspace (uuid, bigint, integer or text).")
]
PathColumn = Annotated[str | None, _host_option("--path-column", "Its column with the path of the file in Storage.")]
Bucket = Annotated[str | None, _host_option("--bucket", "Storage bucket of images whose row names none.")]
UrlColumn = Annotated[str | None, _host_option("--url-column", "Its column with an https URL of the image.")]
TagsColumn = Annotated[
    str | None,
    _host_option("--tags-column", "Its column for the tags (an array of text, or JSON); added if it is missing."),
]
MembersTable = Annotated[
    str | None, _host_option("--members-table", "Table with a row for each member of a workspace.")
]
MembersClaim = Annotated[
    str | None,
    _host_option(
        "--members-claim",
        "Or the claim of the JWT with a user's workspaces, for example app_metadata.orgs.",
        "CLAIM",
    ),
]
FileRule = Annotated[
    str | None,
    _host_option(
        "--file-rule",
        "Which files in Storage a row may name: workspace-folder, workspace-bucket, uploader-folder, owner, any, or a"
        " function of yours that takes a workspace's id, a bucket and a path.",
        "RULE",
    ),
]

Editors = Annotated[
    str | None,
    _host_option(
        "--editors",
        "Who may change a workspace's vocabulary and profiles: none (the default: only your server), or members.",
        "WHO",
    ),
]


OwnerColumn = Annotated[
    str | None,
    _host_option("--owner-column", "Its column with the user who owns an image, where each user is a workspace."),
]
ObjectColumn = Annotated[
    str | None, _host_option("--object-column", "Its column with the id of an object in Storage, instead of a path.")
]
FullPaths = Annotated[
    bool | None,
    typer.Option(
        "--full-paths/--no-full-paths",
        help="Whether paths begin with the name of their bucket (fullPath in supabase-js).",
        rich_help_panel=_TABLES, show_default=False,
    ),
]  # fmt: skip
Where = Annotated[
    str | None,
    _host_option("--where", "Which rows are to be tagged, for example deleted_at is null.", "CONDITION"),
]  # fmt: skip
MembersWorkspaceColumn = Annotated[
    str | None, _host_option("--members-workspace-column", "Column of the table of members with the workspace.")
]
MembersUserColumn = Annotated[
    str | None, _host_option("--members-user-column", "Column of the table of members with the user.")
]
MembersWhere = Annotated[
    str | None,
    _host_option(
        "--members-where", "Which of its rows are members now, for example status = 'active'.", "CONDITION"
    ),
]  # fmt: skip
MembersFunction = Annotated[
    str | None,
    _host_option("--members-function", "Or a function of yours: (workspace) returns boolean, about the caller."),
]
CallerClaim = Annotated[
    str | None,
    _host_option(
        "--caller-claim",
        "The claim of the JWT that says who the caller is, where Clerk, Auth0, Firebase or WorkOS sign people in: sub."
        " Default: auth.uid().",
        "CLAIM",
    ),
]  # fmt: skip
ProjectUrl = Annotated[
    str | None,
    typer.Option(
        "--project-url", metavar="URL", rich_help_panel=_TABLES,
        help="The project's URL, by default $SUPABASE_URL. Image URLs of its Storage are read as files.",
    ),
]  # fmt: skip
#: The attributes of `Choices`, each with its option.
CHOICES = {
    "table": Table, "id": IdColumn, "workspace": WorkspaceColumn, "owner": OwnerColumn, "path": PathColumn,
    "bucket": Bucket, "full_paths": FullPaths, "object": ObjectColumn, "url": UrlColumn, "project_url": ProjectUrl,
    "tags": TagsColumn, "where": Where, "members_table": MembersTable, "members_workspace": MembersWorkspaceColumn,
    "members_user": MembersUserColumn, "members_where": MembersWhere, "members_claim": MembersClaim,
    "members_function": MembersFunction, "caller_claim": CallerClaim, "file_rule": FileRule,
    "editors": Editors,
}  # fmt: skip


def with_choices(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of `CHOICES` in place of its parameter ``choices``."""

    @functools.wraps(command)
    def run(**values: Any) -> None:
        command(choices=Choices(**{name: values.pop(name) for name in CHOICES}), **values)

    hints = get_type_hints(command, include_extras=True)
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        named = CHOICES if name == "choices" else {name: hints[name]}
        defaults = None if name == "choices" else parameter.default
        for option, kind in named.items():
            parameters.append(
                inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=defaults, annotation=kind)
            )
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def read_database_url(value: str) -> str:
    """Reads the value of `DatabaseUrl`, or the file that it names, and keeps its password out of later messages.

    Raises:
        typer.Exit: it is not a connection string. The message has been printed.
    """
    try:
        url = read_connection(value)
    except ValueError as error:
        raise fail(f"DATABASE_URL (or --database-url) {error}.", WRONG_USAGE) from None
    remember_connection(url)
    return url


def read_settings(kind: type[S], changes: Mapping[str, Any] | None = None) -> S:
    """Reads the settings from the environment and from ``.env``; ``changes`` are those that options name.

    Raises:
        typer.Exit: a setting is missing or wrong. The message has been printed.
    """
    try:
        return load_settings(kind, **(changes or {}))
    except SettingsError as error:
        raise fail(str(error), WRONG_USAGE) from None


# -- the last part of a help page

WORKER_URL = ("DATABASE_URL", "Postgres, a login with autotag_worker, or @FILE")
OPERATOR_URL = ("DATABASE_URL", "Postgres, a login with autotag_operator, or @FILE")
OWNER_URL = ("DATABASE_URL", "the default of --database-url")
OPENAI_API_KEY = ("OPENAI_API_KEY", "key of the provider, or @FILE")
OPENAI_BASE_URL = ("OPENAI_BASE_URL", "another provider than OpenAI")
SUPABASE_URL = ("SUPABASE_URL", "the project's URL")
SUPABASE_SECRET_KEY = ("SUPABASE_SECRET_KEY", "its secret key, or @FILE")
EVERY_SETTING = ("AUTOTAG_…", "the other settings (docs/settings.md)")
PROVIDER_AND_STORAGE = (OPENAI_API_KEY, OPENAI_BASE_URL, SUPABASE_URL, SUPABASE_SECRET_KEY, EVERY_SETTING)
EXIT_CODES: dict[int, str] = {0: "done", 1: "failed; the message says why", 2: "wrong option or setting"}


def help_end(
    *,
    environment: Sequence[tuple[str, str]],
    examples: Sequence[str],
    exit_codes: Mapping[int, str] = EXIT_CODES,
    dotenv: bool = True,
) -> str:
    """The end of a help page: environment variables, exit codes and examples, each under a heading.

    Args:
        environment: variables, each with its meaning.
        examples: command lines.
        exit_codes: code -> meaning.
        dotenv: the command reads the variables from a file ``.env`` too.
    """
    width = max(len(name) for name, _ in environment)
    sections = {
        "Environment, or the file .env" if dotenv else "Environment": [
            f"{name:<{width}}  {text}" for name, text in environment
        ],
        "Exit codes": [f"{code:<4} {text}" for code, text in sorted(exit_codes.items())],
        "Examples": list(examples),
    }
    return "\n\n".join(
        "\n".join([f"[bold]{heading}[/bold]", *(f"  {escape(line)}" for line in lines)])
        for heading, lines in sections.items()
    )
