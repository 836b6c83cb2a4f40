"""No message, log line or printed sentence contains a secret."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import psycopg
import pytest
import structlog
from openai.types import Batch
from pydantic import SecretStr, ValidationError
from typer.testing import CliRunner

from autotag import redact
from autotag.cli import app as cli
from autotag.cli.console import fail
from autotag.config import DoctorSettings, Settings, SettingsError, load_settings, read_connection
from autotag.db import connections
from autotag.images.storage import read_reply
from autotag.openai.classify import classify_status
from autotag.openai.output import read_line
from autotag.openai.records import read_batch
from autotag.redact import HIDDEN, redact_event, safe_message
from autotag.worker.poll import polled_batch

KEY, STORAGE_KEY, WEBHOOK = "gateway-key-0123456789", "storage-key-abcdefgh", "whsec_" + "aG9vayBzZWNyZXQvKz0taG9vaw=="
PASSWORD = "p@ss:w/ord%1"
DATABASE = f"postgresql://tagger:{quote(PASSWORD, safe='')}@db.example.com:5432/postgres"
SECRETS = {"key": KEY, "Storage's key": STORAGE_KEY, "webhook": WEBHOOK, "password": PASSWORD,
           "encoded password": quote(PASSWORD, safe="")}  # fmt: skip
every_secret = pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith(("AUTOTAG_", "SUPABASE_", "OPENAI_", "DATABASE_URL"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(redact, "_secrets", set())
    monkeypatch.setattr(redact, "_pattern", None)


@pytest.fixture
def process(_forget: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the environment and reads the settings, as a process does."""
    for name, value in {"DATABASE_URL": DATABASE, "OPENAI_API_KEY": KEY, "SUPABASE_SECRET_KEY": STORAGE_KEY,
                        "OPENAI_WEBHOOK_SECRET": WEBHOOK, "AUTOTAG_WEBHOOK": "127.0.0.1:8081"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    load_settings()


@every_secret
@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 422, 429, 500])
def test_what_a_provider_says_back(secret: str, status: int) -> None:
    for body in (
        {"error": {"message": f"Invalid api key {secret} for this model", "code": f"bad_{secret}", "param": secret}},
        f"<html><p>Unauthorized: Bearer {secret}</p></html>", [{"error": f"unknown key {secret}"}],
        {"detail": [{"msg": f"model not found: {secret}", "loc": ["body", secret]}]},
        {"error": {"message": f"{'x' * 1990} {secret}"}}, json.dumps({"message": f"refused {secret}"}),
    ):  # fmt: skip
        told = json.dumps(classify_status(status, body, {}).as_json(), ensure_ascii=False)
        assert secret not in told
        assert secret[:8] not in told, "nor its beginning"


@every_secret
@pytest.mark.usefixtures("process")
def test_what_a_batch_says_back(secret: str) -> None:
    line = {"custom_id": "1", "response": {"status_code": 401, "body": {"error": {"message": f"bad key {secret}"}}}}
    assert secret not in json.dumps(read_line(json.dumps(line).encode(), 5), ensure_ascii=False)
    batch = Batch.model_validate({
        "id": "batch_1", "completion_window": "24h", "created_at": 1, "endpoint": "/v1/chat/completions",
        "input_file_id": "file-1", "object": "batch", "status": "failed",
        "errors": {"data": [{"code": f"c {secret}", "message": f"not allowed\x1b[2J with {secret}"}]},
    })  # fmt: skip
    told = json.dumps(polled_batch(read_batch(batch)), ensure_ascii=False)
    assert secret not in told
    assert "\\u001b" not in told


@every_secret
@pytest.mark.usefixtures("process")
def test_what_storage_says_back(secret: str) -> None:
    body = json.dumps(
        {"statusCode": "403", "error": "Unauthorized", "message": f"invalid\x1b[2J token {secret}"}
    ).encode()
    answer = read_reply(httpx.Response(400), body)
    assert secret not in answer.message
    assert answer.message == f"invalid[2J token {HIDDEN}"


@every_secret
@pytest.mark.usefixtures("process")
def test_what_a_driver_says(secret: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = psycopg.OperationalError(f"cannot connect with {secret}\nto\x1b[2J the server\n")
    assert safe_message(error) == f"cannot connect with {HIDDEN} to\\x1b[2J the server"
    fail(f"it does not work: {error}")
    assert secret not in capsys.readouterr().err
    with structlog.testing.capture_logs() as lines:
        connections._log_retry(error)
    assert secret not in str(lines)


@every_secret
@pytest.mark.usefixtures("process")
def test_what_is_logged(secret: str) -> None:
    event: dict[str, Any] = {
        "event": f"e {secret}", "message": f"a\nforged line {secret}", "task": 3, "many": [secret],
        "exception": f"Traceback\n  File x\nValueError: {secret}\x1b[2J",
    }  # fmt: skip
    told = redact_event(None, "info", event)
    assert secret not in str(told)
    assert told["task"] == 3
    assert told["message"] == f"a forged line {HIDDEN}"
    assert told["exception"] == f"Traceback\n  File x\nValueError: {HIDDEN}\\x1b[2J"


def test_what_looks_like_a_secret_is_one() -> None:
    jwt = "eyJhbGciOiJIUzI1NiJ9.eyJyb2xlIjoic2VydmljZV9yb2xlIn0.c2lnbmF0dXJl"
    for text, shown in (
        ("key sk-proj-abcdefghijklmnop123 is wrong", f"key sk-{HIDDEN} is wrong"), (f"Bearer {jwt}", f"Bearer {HIDDEN}"),
        ("sb_secret_abcdefghijklmno", f"sb_secret_{HIDDEN}"),
        ("postgresql://u:p@ss@host/db failed", f"postgresql://u:{HIDDEN}@host/db failed"),
        ("host=h password='a b' user=u", f"host=h password={HIDDEN} user=u"),
        ("password authentication failed for user \"u\"", "password authentication failed for user \"u\""),
        ("https://images.example.com/a.jpg", "https://images.example.com/a.jpg"),
    ):  # fmt: skip
        assert redact.redact(text) == shown


@pytest.mark.parametrize("text", ["://:", "://a:", "eyJ-", "password='", "password ", "sk-", "eyJaaaaaaaa.", "a:b@"])
def test_no_text_takes_long(text: str) -> None:
    redact.remember(KEY, PASSWORD)
    started = time.process_time()
    redact.redact(text * 1_000_000)
    assert time.process_time() - started < 2


def test_short_words_and_the_local_password_stay_words() -> None:
    redact.remember("none", "postgres", "", None)
    assert redact.redact("none of postgres") == "none of postgres"


# -- connection strings

UNREADABLE = [
    "postgresql://tagger:hunter2@db:x/postgres", "postgresql://tagger:hunter2@db.example.com/postgres?nonsense=hunter2",
    "postgresql://tagger:hunter2@db.example.com/postgres?hun ter2", "postgresql://tagger:hunter2@db.example.com/a b",
    "mysql://tagger:hunter2@db.example.com/postgres", "https://abc.supabase.co?hunter2", "hunter2", "host='hunter2",
    "postgresql://tagger:hunter2@db.[YOUR-PROJECT-REF].supabase.co/postgres",
]  # fmt: skip


@pytest.mark.parametrize("url", UNREADABLE)
@pytest.mark.parametrize("command", [["status"], ["migrate", "--yes"], ["init", "--yes"], ["doctor"], ["worker"]])
def test_a_connection_string_that_cannot_be_parsed_is_one_sentence_without_it(
    url: str, command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "supabase").mkdir()
    (tmp_path / "supabase" / "config.toml").touch()
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 2, done.output
    assert done.output.startswith("autotag: DATABASE_URL")
    assert done.output.count("\n") == 1
    assert "hunter2" not in done.output + str(done.exception)


def test_a_file_holds_the_connection_string(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text(f'"{DATABASE}"\n')
    assert read_connection(f"@{file}") == DATABASE
    monkeypatch.setenv("DATABASE_URL", f" @{file}\n")
    assert str(load_settings(DoctorSettings).database_url) == DATABASE
    file.write_text("postgresql://u:hunter2hunter2@127.0.0.1:1/x")
    for arguments in (["migrate", "--stand-alone", "--database-url", f"@{file}"], ["status"]):
        done = CliRunner().invoke(cli.app, arguments)
        assert done.exit_code == 1, "it was read, and nothing answers there"
        assert "hunter2" not in done.output
    monkeypatch.setenv("DATABASE_URL", "@/nowhere/url")
    for arguments in (["migrate", "--yes"], ["status"]):
        done = CliRunner().invoke(cli.app, arguments)
        assert done.exit_code == 2
        assert "names a file that cannot be read (No such file or directory)" in done.output
    with pytest.raises(SettingsError, match="DATABASE_URL is wrong: names a file"):
        load_settings(DoctorSettings)


class MoreSettings(Settings):
    """Settings with secrets that a later version may add."""

    next_key: SecretStr | None = None
    other_key: SecretStr = SecretStr("")


def test_every_secret_of_the_settings_is_removed_and_may_be_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}-in-a-file\n")
    MoreSettings(
        database_url="postgresql://127.0.0.1/postgres", openai_api_key="sk-1", supabase_secret_key=f"{KEY}-known",
        next_key=f"@{file}", other_key=f" {KEY}-pasted ",
    )  # type: ignore[arg-type]  # fmt: skip
    for secret in (f"{KEY}-in-a-file", f"{KEY}-pasted", f"{KEY}-known"):
        assert redact.redact(f"<{secret}>") == f"<{HIDDEN}>"
    with pytest.raises(ValidationError, match="paste it again"):
        MoreSettings(database_url="postgresql://127.0.0.1/postgres", openai_api_key="sk-1", next_key="a b")  # type: ignore[arg-type]
