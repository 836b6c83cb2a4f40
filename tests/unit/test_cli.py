"""The commands' help pages, exit codes and messages, and the work behind them without a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args, get_type_hints

import psycopg
import psycopg_pool
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from autotag.cli import app as app_module
from autotag.cli import errors, questions, usage
from autotag.cli.app import COMMANDS, app
from autotag.config import GONE, OperatorSettings, SettingsError, load_settings
from autotag.db import Refused, VersionsDiffer
from autotag.install.facts import Facts, Table
from autotag.install.host import Choices, HostError, propose
from autotag.install.migrations import spending_limit
from autotag.install.survey import plan_spending_limit, refuse_to_ask
from autotag.operate import backfill as work
from autotag.operate.backfill import Backfill, backfill

NAMES = [command.__name__ for commands in COMMANDS.values() for command, _ in commands]


@pytest.mark.parametrize("name", NAMES)
def test_a_help_page_says_what_the_command_does_reads_and_returns(name: str) -> None:
    done = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "100"})
    assert done.exit_code == 0
    shown = done.output
    places = [shown.index(heading) for heading in ("Usage:", "Options", "Environment", "Exit codes", "Examples")]
    assert places == sorted(places)
    assert "DATABASE_URL" in shown
    assert f"autotag {name}" in shown[places[-1] :], "an example"
    assert (name == "worker") or "--json" in shown


def test_a_command_starts_without_what_only_others_need() -> None:
    """Commands do not import clients that they do not use, because importing these takes longer than everything
    else."""
    code = "import sys, autotag.cli.app; print(*sorted({'openai', 'httpx', 'aiohttp', 'realtime', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "\n"


def test_no_number_of_an_option_is_infinite_or_not_a_number() -> None:
    """nan would be a spending limit that no cost exceeds."""
    options = [
        (command.__name__, "--" + name.replace("_", "-"))
        for commands in COMMANDS.values()
        for command, _ in commands
        for name, hint in get_type_hints(command, include_extras=True).items()
        if name != "return" and float in get_args(get_args(hint)[0])
    ]
    assert {option for _, option in options} == {"--spending-limit", "--min-confidence"}
    more = {"profile": ["set", "--all"]}
    for command, option in options:
        for number in ("nan", "inf", "-inf", "-1"):
            done = CliRunner().invoke(app, [command, *more.get(command, []), f"{option}={number}"])
            assert (done.exit_code, "Invalid value" in done.stderr) == (2, True), (command, number, done.output)


def test_a_spending_limit_is_asked_for_until_it_is_one() -> None:
    ask = typer.Typer()
    ask.command()(lambda: typer.echo(f"{questions.ask_spending_limit():g}"))
    done = CliRunner().invoke(ask, input="nan\n-5\ninf\nten\n12.5\n")
    assert done.stdout.rstrip().endswith("12.5")


@pytest.mark.parametrize("url", ["postgresql://nobody@127.0.0.1:1/x?connect_timeout=1", "://"])
@pytest.mark.parametrize("command", [name for name in NAMES if name != "worker"])
def test_with_json_an_error_is_json_too(
    command: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """stdout has one JSON document, and stderr the sentence for people."""
    monkeypatch.setattr("autotag.cli.doctor.configure_logs", lambda *_: None)  # for the process, not for one test
    (tmp_path / "tags.csv").write_text("tag\ncat\n")
    more = {
        "compare": ["--workspace", "w", "--model", "gpt-5", "--yes"], "enqueue": ["--workspace", "w", "--yes"],
        "vocabulary": ["import", str(tmp_path / "tags.csv")], "init": [str(tmp_path)],
        "watch": ["--workspace", "w"], "usage": ["--workspace", "w"], "profile": ["show"],
    }  # fmt: skip
    given = [command, *more.get(command, []), "--json"]
    done = CliRunner().invoke(app, given, env={"DATABASE_URL": url, "OPENAI_API_KEY": "k"})
    assert done.exit_code != 0
    assert "Traceback" not in done.stderr
    told = json.loads(done.stdout)
    assert isinstance(told, dict)
    assert told.keys() == ({"worst", "findings"} if command == "doctor" and url != "://" else {"error"})
    if "error" in told:
        assert f"autotag: {told['error']}" in done.stderr


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("usage --workspace w --since 2026-13-01", "2026-13-01"),
        ("usage", "--workspace"),
        ("usage --workspace w --nothing", "--nothing"),
        ("nothing", "nothing"),
        ("--nothing", "--nothing"),
        ("usage --workspace w --csv", "--csv and --json"),
        ("usage --workspace w --since 2026-12-02 --until 2026-12-01", "--since is after --until"),
        *[(f"profile set --all --min-confidence {number}", "--min-confidence") for number in ("nan", "inf", "-inf")],
        *[
            (f"{command} --spending-limit {number}", "--spending-limit")
            for command in ("init", "migrate")
            for number in ("nan", "inf")
        ],
        ("usage --workspace w", "autotag_operator"),
        ("compare --workspace w --model m", "autotag_operator"),
        ("status", "autotag_worker"),
    ],
)
def test_wrong_usage_is_said_to_people_and_to_programs(
    given: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no .env of the developer's
    names = ("AUTOTAG_DATABASE_URL", "SUPABASE_DB_URL", "DATABASE_URL")
    done = CliRunner().invoke(app, [*given.split(), "--json"], env=dict.fromkeys(names) | {"TERMINAL_WIDTH": "200"})
    assert done.exit_code == 2
    said = json.loads(done.stdout)["error"]
    assert told in said
    assert said in done.stderr


@pytest.mark.parametrize("command", ["status", "doctor", "worker"])
def test_a_dotenv_in_another_encoding_is_one_sentence(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("OPENAI_API_KEY=k", "utf-16")
    done = CliRunner().invoke(app, [command, *(["--json"] if command != "worker" else [])])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "save it again with the encoding UTF-8" in (done.stderr if command == "worker" else done.stdout)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("SUPABASE_DB_URL=nonsense", "SUPABASE_DB_URL is wrong: "),
        ("supabase_db_url=nonsense", "SUPABASE_DB_URL is wrong: "),
        *((f"{name}=1", f"{name} is gone: ") for name in GONE),
    ],
)
def test_a_variable_in_a_dotenv_is_named_as_the_file_names_it(
    line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("AUTOTAG_DATABASE_URL", "SUPABASE_DB_URL", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".env").write_text(line)
    with pytest.raises(SettingsError, match=f"^{re.escape(said)}"):
        load_settings(OperatorSettings)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_lacks_characters_gets_others(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding))
    monkeypatch.setattr(app_module, "tame_libraries", lambda: print("✓ done"))
    with pytest.raises(SystemExit) as ended:
        app(["--version"])
    assert ended.value.code == 0
    assert b"? done" in shown.getvalue()


@pytest.mark.parametrize("given", ["--version", "--help", "usage --help", "usage --nothing --json"])
@pytest.mark.parametrize("full", [True, False])
def test_output_that_cannot_be_written_is_said(
    given: str, full: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk is reported in one sentence. A pipe without a reader (``autotag … | head``) ends the command
    silently."""
    reader, writer = (None, "/dev/full") if full else os.pipe()
    if reader is not None:
        os.close(reader)
    file = open(writer, "w", encoding="utf-8")  # noqa: SIM115  closing it can fail
    monkeypatch.setattr(sys, "stdout", file)
    with pytest.raises(SystemExit) as ended:
        app(given.split())
    sys.stdout.flush()  # as Python does at exit
    with nullcontext() if full else suppress(BrokenPipeError):
        file.close()
    assert ended.value.code == 1
    said = capsys.readouterr().err.splitlines()
    wrong = ["--nothing"] if "--nothing" in given else []
    last = ["cannot be written (No space"] if full else []
    assert len(said) == len(wrong + last)
    assert all(part in line for part, line in zip(wrong + last, said, strict=True))


def test_every_module_of_a_command_is_one() -> None:
    folder = Path(errors.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} - set(NAMES) == {
        "__init__", "app", "console", "database", "errors", "options", "questions", "screen",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "code", "advice"),
    [
        (VersionsDiffer("This worker is autotag 1.", "Upgrade it."), 3, "Upgrade it."),
        (Refused("The quota is used up.", "Raise it.", None), 1, "Raise it."),
        (psycopg.OperationalError("connection refused"), 1, "check DATABASE_URL"),
        (psycopg_pool.PoolTimeout("no connection"), 1, "check DATABASE_URL"),
        (psycopg.errors.InsufficientPrivilege(), 1, "grant autotag_worker to"),
        (psycopg.errors.UndefinedFunction(), 1, "autotag migrate"),
        (psycopg.errors.InvalidSchemaName(), 1, "autotag migrate"),
        (psycopg.errors.InvalidTextRepresentation(), 2, "An option has a wrong value"),
    ],
)
def test_an_error_is_one_sentence_with_advice(
    error: Exception, code: int, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as caught, errors.explain_errors("autotag_worker"):
        raise error
    said = capsys.readouterr().err
    assert (caught.value.exit_code, said.count("\n")) == (code, 1)
    assert said.startswith("autotag: ")
    assert advice in said


@pytest.mark.parametrize(
    ("error", "url", "code", "advice"),
    [
        (HostError("There is no table public.x; name it with --table."), "", 2, "--table"),
        (psycopg.errors.LockNotAvailable(), "", 1, "run the command again"),
        (psycopg.errors.InsufficientPrivilege(), "", 1, "database's owner"),
        (psycopg.errors.InvalidSchemaName(), "", 1, "Supabase project"),
        (psycopg.OperationalError("refused"), "postgresql://x", 1, "check DATABASE_URL"),
        (psycopg.OperationalError("refused"), errors.LOCAL_DATABASE, 1, "supabase start"),
        (psycopg.errors.SyntaxError(), "", 1, "were not applied"),
        (PermissionError(13, "Permission denied", "/srv/supabase"), "", 1, "/srv/supabase"),
    ],
)
def test_so_is_an_error_of_an_installation(
    error: Exception, url: str, code: int, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as caught, errors.explain_install_errors(url):
        raise error
    assert caught.value.exit_code == code
    assert advice in capsys.readouterr().err


# -- the work behind the commands


class FakeOperator:
    """A database with a number of untagged images. Its limits admit nothing at the first calls."""

    def __init__(self, images: int, refusals: int = 0) -> None:
        self.left, self.refusals, self.number = images, refusals, 0

    async def backfill(
        self, workspace: str, untagged: bool, after: str | None, limit: int, *, outdated: bool
    ) -> dict[str, Any]:
        if self.refusals:
            self.refusals -= 1
            raise Refused("Too many live images.", None, 0.0)
        taken = min(limit, self.left)
        self.left -= taken
        self.number += taken
        return {"job_id": "j", "images": taken, "last": str(self.number) if taken else None}


async def enqueue(operator: Any, on_progress: Callable[[Backfill, str | None], None], **changes: Any) -> Backfill:
    options: dict[str, Any] = {"untagged": True, "after": None, "limit": 10_000} | changes
    return await backfill(operator, "w", on_progress=on_progress, **options)


async def test_a_backfill_goes_slice_by_slice_and_reports_each() -> None:
    totals: list[tuple[int, int, str | None]] = []
    done = await enqueue(FakeOperator(2500), lambda done, _: totals.append((done.images, done.jobs, done.last)))
    assert totals == [(1000, 1, "1000"), (2000, 2, "2000"), (2500, 3, "2500")]
    assert done == Backfill(images=2500, jobs=3, last="2500")


async def test_a_backfill_ends_at_its_limit_and_names_where_to_go_on() -> None:
    done = await enqueue(FakeOperator(2500), lambda *_: None, limit=1200, after="0")
    assert done == Backfill(images=1200, jobs=2, last="1200")
    assert await enqueue(FakeOperator(0), lambda *_: None, after="7") == Backfill(last="7")


async def test_a_backfill_waits_for_room_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: list[str | None] = []
    monkeypatch.setattr(work, "MAX_WAIT", 0.0)
    done = await enqueue(FakeOperator(5, refusals=2), lambda _, reason: reasons.append(reason))
    assert (done.images, reasons) == (5, ["Too many live images.", "Too many live images.", None])


async def test_a_refusal_for_good_ends_a_backfill() -> None:
    class Refusing:
        async def backfill(self, *_: Any, **__: Any) -> dict[str, Any]:
            raise Refused("No such workspace.", None, None)

    with pytest.raises(Refused, match="No such workspace"):
        await enqueue(Refusing(), lambda *_: None)


def test_without_a_person_a_question_names_its_option() -> None:
    with pytest.raises(HostError, match=r"^Which table\? Set --table \(one of a, b\)\.$"):
        refuse_to_ask("--table", "Which table?", ["a", "b"])
    with pytest.raises(HostError, match="has no table of images yet"):
        propose(Facts({}, []), Choices(), refuse_to_ask)


def test_a_person_who_names_no_table_of_members_learns_what_it_needs() -> None:
    columns = {"workspace_id": "uuid", "user_id": "uuid"}
    tables = [
        Table("public.assets", {"id": "uuid", "workspace_id": "uuid", "image_url": "text"}, ["id"]),
        Table("public.members", columns, ["workspace_id", "user_id"]),
        Table("public.team_members", columns, ["workspace_id", "user_id"]),
    ]
    facts = Facts({table.name: table for table in tables}, [])
    assert propose(facts, Choices(), lambda *_: "members").members.table == "public.members"
    with pytest.raises(
        HostError,
        match=r"There is no table public\.memebrs",
    ):
        propose(facts, Choices(), lambda *_: "memebrs")


@pytest.mark.parametrize("kind", ["text[]", "character varying[]", "citext[]", "extensions.citext[]", "jsonb", "json"])
def test_people_may_keep_tags_in_a_list_of_any_type(kind: str) -> None:
    host = propose(facts_of({"tags": kind}), Choices(members_claim="org"), refuse_to_ask)
    assert (host.tags, host.tags_type) == ("tags", kind)


@pytest.mark.parametrize(
    ("columns", "generated", "told"),
    [
        (
            {"tags": "text"},
            [],
            r"tags is text; tags go into a text\[\], .*; name another column with --tags-column \(ai_tags",
        ),
        ({"tags": "public.mood[]"}, [], r"tags is public\.mood\[\]; tags go into"),
        ({"tags": "text[]"}, ["tags"], r"tags is a generated column, which nobody can write; name another"),
        (
            {"tags": "text[]", "tagging_result": "text"},
            [],
            r"tagging_result is text; autotag needs a column of this name that is jsonb",
        ),
    ],
)
def test_a_column_that_cannot_hold_tags_is_refused(columns: dict[str, str], generated: list[str], told: str) -> None:
    with pytest.raises(HostError, match=told):
        propose(facts_of(columns, generated), Choices(members_claim="org"), refuse_to_ask)
    assert (
        propose(facts_of({"labels": "json", "tags": "text"}), Choices(members_claim="org"), refuse_to_ask).tags
        == "labels"
    )


def facts_of(columns: dict[str, str], generated: Sequence[str] = ()) -> Facts:
    every = {"id": "uuid", "workspace_id": "uuid", "image_url": "text", **columns}
    return Facts({"public.assets": Table("public.assets", every, ["id"], generated=list(generated))}, [])


def test_a_spending_limit_is_asked_for_once(tmp_path: Path) -> None:
    new, installed = Facts({}, []), Facts({}, [], adapter=1)
    limited = Facts({}, [], applied={"spending_limit": "1"}, spending_limits=[5.0])
    [limit] = plan_spending_limit(None, new, None, lambda: 12.5)
    assert "12.50" in limit.sql
    assert plan_spending_limit(None, new, None, None) == plan_spending_limit(0, new, None, lambda: 5) == []
    assert plan_spending_limit(None, installed, None, lambda: 5) == plan_spending_limit(5, limited, None, None) == []
    with pytest.raises(HostError, match="0 means no limit"):
        plan_spending_limit(None, new, None, lambda: -1)
    (tmp_path / "20270101000000_autotag_spending_limit.sql").write_text(spending_limit(5).sql)
    assert plan_spending_limit(5, new, tmp_path, None) == plan_spending_limit(None, new, tmp_path, None) == []
    with pytest.raises(HostError, match="has another limit"):
        plan_spending_limit(6, new, tmp_path, None)


@pytest.mark.parametrize("applied", [{}, {"spending_limit": "1"}])
@pytest.mark.parametrize("limits", [[], [None], [0.0], [20.0]])
def test_another_spending_limit_than_the_databases_is_never_ignored(
    applied: dict[str, str], limits: list[float | None]
) -> None:
    """The limit may be from a migration or from the project itself. 0 dollars mean no limit as an option, but a limit
    in a quota."""
    facts = Facts({}, [], applied=applied, spending_limits=limits)
    present = limits[0] if limits else None
    for wanted in (0.0, 5.0, 20.0):
        if (wanted or None) == present or (not wanted and present is None):
            assert plan_spending_limit(wanted, facts, None, None) == []
        elif applied or limits:
            change = "update autotag.quotas set" if limits else "insert into autotag.quotas"
            with pytest.raises(HostError, match=f"{change} .*({wanted:.2f}|null)"):
                plan_spending_limit(wanted, facts, None, None)
        else:
            assert [f"{wanted:.2f}" in one.sql for one in plan_spending_limit(wanted, facts, None, None)] == [True]
    assert plan_spending_limit(None, facts, None, None) == []


@pytest.mark.parametrize(("width", "gone"), [(200, []), (120, ["written", "cached"]), (80, ["reasoning", "input"])])
def test_a_narrow_terminal_gets_fewer_columns_and_whole_ones(
    width: int, gone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row: Any = {
        "user_id": "6f1c0000-0000-4000-8000-000000000000", "day": date(2026, 12, 1), "model": "gpt-6-luna-2026-10-06",
        "service_tier": "default", "images": 1200, "requests": 1250, "input_tokens": 1_234_567, "cached_tokens": 1_000_000,
        "cache_write_tokens": 0, "output_tokens": 98_765, "reasoning_tokens": 0, "cost": Decimal("12.5"),
    }  # fmt: skip
    shown = io.StringIO()
    monkeypatch.setattr(usage, "Console", lambda: Console(width=width, force_terminal=True, file=shown, no_color=True))
    usage._print_table([row])
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())
    assert "…" not in text
    assert "6f1c0000-0000-4000-8000-000000000000" in text.splitlines()[1]
    heads = text.splitlines()[0].split()
    assert [name for name in gone if name in heads] == []
    assert ("For want of room without" in text) == bool(gone)
    assert {"user", "day", "images", "cost"} <= set(heads)


def test_a_full_disk_behind_stderr_takes_nothing_from_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        with pytest.raises(SystemExit) as ended:
            app(["usage", "--json"])
        monkeypatch.undo()
        with suppress(OSError):
            full.close()
    assert ended.value.code == 2
    assert "--workspace" in json.loads(capsys.readouterr().out)["error"]
