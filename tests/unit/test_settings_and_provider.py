"""Errors of settings name what is missing, and headers and errors of the provider are read with care."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import aiohttp
import httpx2
import pytest

from autotag.config import DoctorSettings, SettingsError, load_settings
from autotag.errors import TaggingError
from autotag.openai import http
from autotag.openai.classify import classify_status
from autotag.openai.errors import classified_errors
from autotag.openai.headers import read_limits
from autotag.redact import redact
from autotag.waits import backoff, retry_after
from support import PATIENCE

WEBHOOK_SECRET = "whsec_c2l4dGVlbiBieXRlcyBvciBtb3Jl"
GOOD = {"DATABASE_URL": "postgresql://u:p@localhost/db", "OPENAI_API_KEY": "sk-1"}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # no .env of the developer's
    for name in ("DATABASE_URL", "SUPABASE_DB_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL", "SUPABASE_URL",
                 "SUPABASE_SECRET_KEY", "OPENAI_WEBHOOK_SECRET", "AUTOTAG_WEBHOOK", "AUTOTAG_HTTP"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"DATABASE_URL": None}, "DATABASE_URL is not set"),
        ({"OPENAI_API_KEY": None}, "OPENAI_API_KEY is not set"),
        ({"OPENAI_API_KEY": ""}, "OPENAI_API_KEY is wrong"),
        ({"DATABASE_URL": "mysql://x/y"}, "DATABASE_URL is wrong"),
        (
            {"DATABASE_URL": "postgresql://u:p@localhost:x/db"},
            "DATABASE_URL is wrong: cannot be read as a connection string",
        ),
        ({"DATABASE_URL": "localhost"}, "DATABASE_URL is wrong: must start with postgresql://"),
        (
            {"OPENAI_BASE_URL": "https://me:secret@api.example/v1"},
            "OPENAI_BASE_URL is wrong: has a user or password in it",
        ),
        (
            {"OPENAI_BASE_URL": "https://api.example/v1?api-key=secret"},
            "OPENAI_BASE_URL is wrong: must not have a ? or # part",
        ),
        ({"SUPABASE_URL": "project.supabase.co"}, "SUPABASE_URL is wrong: must start with https://"),
        ({"AUTOTAG_SLOTS": "many"}, "AUTOTAG_SLOTS is wrong"),
        ({"AUTOTAG_SLOTS": "0"}, "AUTOTAG_SLOTS is wrong"),
        ({"AUTOTAG_MEMORY": "100"}, "AUTOTAG_MEMORY is wrong: Input should be greater than or equal to 300"),
        ({"AUTOTAG_IMAGE_MAX_BYTES": "400000000"}, "AUTOTAG_MEMORY (512 MB) is too small for files of"),
        ({"AUTOTAG_IMAGE_MAX_PIXELS": "1"}, "AUTOTAG_IMAGE_MAX_PIXELS is gone: what is limited is not"),
        *[
            ({f"AUTOTAG_{name}": number}, f"AUTOTAG_{name} is wrong")
            for name in ("CALL_TIMEOUT", "STOP_DEADLINE", "POLL_INTERVAL")
            for number in ("nan", "inf")
        ],
        *[
            ({"AUTOTAG_IMAGE_HOSTS": f"a.example.com,{host}"}, "AUTOTAG_IMAGE_HOSTS is wrong: ")
            for host in (
                "http://x y",
                "https://x.example",
                "x.example/a",
                "x:443",
                "*.example.com",
                "a..b",
                "me@x",
                "::::",
                "dead:443:",
            )
        ],
        ({"AUTOTAG_HTTP": "8080"}, "AUTOTAG_HTTP is wrong: must be HOST:PORT"),
        ({"AUTOTAG_HTTP": "0.0.0.0:65536"}, "AUTOTAG_HTTP is wrong: must be HOST:PORT"),
        ({"AUTOTAG_WEBHOOK": ":"}, "AUTOTAG_WEBHOOK is wrong: must be HOST:PORT"),
        ({"AUTOTAG_WEBHOOK": "0.0.0.0:80"}, "--webhook (AUTOTAG_WEBHOOK) needs OPENAI_WEBHOOK_SECRET"),
        ({"OPENAI_WEBHOOK_SECRET": WEBHOOK_SECRET}, "OPENAI_WEBHOOK_SECRET is set, but the webhook has no address"),
        *[
            (
                {"AUTOTAG_WEBHOOK": "0.0.0.0:80", "OPENAI_WEBHOOK_SECRET": secret},
                "OPENAI_WEBHOOK_SECRET does not look like one",
            )
            for secret in ("", "whsec_", "whsec_c2hvcnQ=", WEBHOOK_SECRET[6:], "whsec_" + "*" * 32, "whsec_abcde" * 5)
        ],
    ],
)
def test_a_missing_or_wrong_setting_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], sentence: str
) -> None:
    for name, value in {**GOOD, **changes}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
    assert "sk-1" not in str(caught.value)


def test_the_usual_names_and_a_list_of_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**GOOD, "AUTOTAG_IMAGE_HOSTS": "a.example.com, B.example.com", "AUTOTAG_SLOTS": "7"}.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert settings.image_hosts == {"a.example.com", "b.example.com"}
    assert (settings.slots, settings.openai_base_url) == (7, "https://api.openai.com/v1")
    assert "sk-1" not in repr(settings)


@pytest.mark.parametrize(
    "wrapped", ['"{}"', "'{}'", "{}\n", "  {} ", '"{}"\r\n', "\ufeff{}", "\u201c{}\u201d", "\t'{}' "]
)
def test_keys_and_urls_may_be_pasted_with_quotes_and_line_ends(wrapped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {**GOOD, "SUPABASE_URL": "https://p.supabase.co/", "SUPABASE_SECRET_KEY": "sb_secret_1",
             "OPENAI_BASE_URL": "https://o.example.com/v1", "OPENAI_WEBHOOK_SECRET": WEBHOOK_SECRET}  # fmt: skip
    for name, value in plain.items():
        monkeypatch.setenv(name, wrapped.format(value))
    monkeypatch.setenv("AUTOTAG_WEBHOOK", "0.0.0.0:80")
    settings = load_settings()
    assert settings.openai_api_key.get_secret_value() == "sk-1"
    assert settings.secret_key() == "sb_secret_1"
    assert settings.openai_webhook_secret
    assert settings.openai_webhook_secret.get_secret_value() == WEBHOOK_SECRET
    assert (settings.supabase_url, settings.openai_base_url) == ("https://p.supabase.co", "https://o.example.com/v1")
    assert str(settings.database_url) == GOOD["DATABASE_URL"]


SECRETS = {
    "DATABASE_URL": GOOD["DATABASE_URL"], "OPENAI_API_KEY": "sk-from-a-file", "SUPABASE_SECRET_KEY": "sb_secret_file",
    "OPENAI_WEBHOOK_SECRET": WEBHOOK_SECRET,
}  # fmt: skip


def test_every_secret_may_lie_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, secret in SECRETS.items():
        (tmp_path / name).write_text(f"{secret}\n")
        monkeypatch.setenv(name, f"@{tmp_path / name}")
    monkeypatch.setenv("AUTOTAG_WEBHOOK", "0.0.0.0:80")
    settings = load_settings()
    assert settings.openai_webhook_secret
    assert (
        str(settings.database_url), settings.openai_api_key.get_secret_value(), settings.secret_key(),
        settings.openai_webhook_secret.get_secret_value(),
    ) == tuple(SECRETS.values())  # fmt: skip
    assert redact("it was sk-from-a-file, and sb_secret_file") == "it was ***, and ***"


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot be read (No such file or directory)"), (b"", "is empty"), (b" \n", "is empty"),
     (b"hunter2\xff\xfe\x00", "cannot be read (it is not text)")],
)  # fmt: skip
def test_a_secrets_file_that_holds_none_is_one_sentence(
    name: str, content: bytes | None, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable, value in {**GOOD, name: f"@{tmp_path / 'file'}"}.items():
        monkeypatch.setenv(variable, value)
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value).startswith(f"{name} is wrong: names a file that {says} (")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("inside", ["\n", "\r\n", " ", "\t", "\x1b[0m", "\x7f", "\u200b", "ü", "…"])
@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "SUPABASE_SECRET_KEY", "OPENAI_WEBHOOK_SECRET", "SUPABASE_URL"])
def test_a_key_or_url_in_two_pieces_is_one_sentence(name: str, inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = "https://topsecret" if name == "SUPABASE_URL" else "topsecret"
    for variable, value in {**GOOD, name: f"{start}{inside}hidden"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value).startswith(f"{name} is wrong: contains a blank, a line break or another character")
    assert not any(part in str(caught.value) for part in ("topsecret", "hidden", "\n", "\x1b"))


LIMITS = {
    "x-ratelimit-limit-requests": "500", "x-ratelimit-remaining-requests": "499", "x-ratelimit-reset-requests": "120ms",
    "x-ratelimit-limit-tokens": "200000", "x-ratelimit-remaining-tokens": "0",
}  # fmt: skip


def test_limits_in_headers() -> None:
    assert read_limits(LIMITS) == {
        "requests_limit": 500, "requests_left": 499, "tokens_limit": 200_000, "tokens_left": 0,
    }  # fmt: skip
    assert read_limits({}) == {}
    assert read_limits({**LIMITS, "x-ratelimit-limit-requests": "0"}) == {
        "tokens_limit": 200_000, "tokens_left": 0,
    }  # fmt: skip
    assert read_limits({"x-ratelimit-remaining-requests": "-1", "x-ratelimit-limit-tokens": "lots"}) == {}


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ({"retry-after": "7"}, 7.0), ({"retry-after-ms": "250", "retry-after": "1"}, 0.25), ({}, None),
        ({"retry-after": "0"}, None), ({"retry-after": "-3"}, None), ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None), ({"retry-after": "inf"}, None), ({"retry-after": "300"}, 300.0),
        ({"retry-after": "86400"}, 3600.0), ({"retry-after": "Mon, 01 Jan 1990 00:00:00 GMT"}, None),
    ],
)  # fmt: skip
def test_retry_after_is_believed_only_when_it_makes_sense(given: dict[str, str], seconds: float | None) -> None:
    assert retry_after(given) == seconds


@pytest.mark.parametrize(
    ("status", "body", "kind", "code"),
    [
        (401, {"error": {"code": "invalid_api_key", "message": "Incorrect API key."}}, "account", "invalid_api_key"),
        (429, {"error": {"code": "insufficient_quota", "message": "You exceeded your quota."}}, "account",
         "insufficient_quota"),
        (404, {"error": {"code": "model_not_found", "message": "No such model."}}, "account", "model_not_found"),
        (429, {"error": {"code": "rate_limit_exceeded"}}, "rate_limit", "rate_limited"),
        (429, None, "rate_limit", "rate_limited"),
        (500, "<html>", "transient", "provider_error"),
        (0, None, "transient", "provider_error"),
        (400, {"error": {"code": "invalid_image", "message": "Bad."}}, "image", "image_refused"),
        (400, {"error": {"message": "You uploaded an unsupported image."}}, "image", "image_refused"),
        (400, {"code": "content_policy_violation", "message": "No."}, "image", "image_refused"),
        (400, {"error": {"message": "Something else."}}, "transient", "request_refused"),
        (400, {"error": {"message": "Cannot find file file-1, or project p does not have access to it."}}, "transient",
         "file_not_there_yet"),
    ],
)  # fmt: skip
def test_errors_are_sorted_by_whose_they_are(status: int, body: object, kind: str, code: str) -> None:
    error = classify_status(status, body, {})
    assert (error.kind, error.code) == (kind, code)


def test_a_wait_may_be_a_date() -> None:
    at = datetime.now(UTC) + timedelta(seconds=90)
    wait = retry_after({"retry-after": format_datetime(at, usegmt=True)})
    assert wait is not None
    assert 85 < wait <= 90


@pytest.mark.parametrize(
    "error", [httpx2.ReadError("reset"), aiohttp.ClientPayloadError("no HTTP")], ids=["reset", "no HTTP"]
)
def test_a_file_that_breaks_off_is_the_providers_trouble(error: Exception) -> None:
    """The SDK does not wrap errors that occur while the body of an answer is read."""
    with pytest.raises(TaggingError) as caught, classified_errors():
        raise error
    assert (caught.value.kind, caught.value.code, caught.value.origin) == (
        "transient",
        "provider_unreachable",
        "provider",
    )


@pytest.mark.parametrize(("seconds", "connections"), [(0.05, 2), (PATIENCE, 1)])
async def test_a_connection_that_the_server_may_be_closing_is_not_used(
    seconds: float, connections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the server closed the connection at the same moment, the request would be lost."""
    opened = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    assert http.KEEP_ALIVE < 5, "what uvicorn and Node wait"
    monkeypatch.setattr(http, "KEEP_ALIVE", seconds)
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, http.make_http() as client:
        for _ in range(2):
            assert (await client.get(url)).status_code == 200
            await asyncio.sleep(0.1)  # longer than the first of the two, shorter than the second
    assert opened == connections


def test_the_form_of_a_connection_string_is_legible_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (GOOD | {"DATABASE_URL": "postgresql://u:p@q@localhost:y/db"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert "***" not in redact(str(caught.value))


def test_hosts_of_every_language_and_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = ("images.example.com", "X_1.example.", "भारत.example", "bücher.de", "localhost", "10.0.0.1", "2001:db8::1")
    monkeypatch.setenv("AUTOTAG_IMAGE_HOSTS", ", ".join([*hosts, "[::1]"]))
    assert load_settings(DoctorSettings, database_url="postgresql://x@y/z").image_hosts == {
        *(host.lower() for host in hosts), "::1",
    }  # fmt: skip


def test_waits_double_up_to_a_limit_however_often_something_fails() -> None:
    """A table that is locked for three hours is tried a thousand times, and 2.0 ** 1024 is no number."""
    assert [backoff(0.5, 10.0, failures) for failures in (1, 2, 3, 6, 5000)] == [0.5, 1.0, 2.0, 10.0, 10.0]
