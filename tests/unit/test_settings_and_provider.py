"""Settings name what is missing; headers and errors of the provider are read with care."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotag import provider
from autotag.config import SettingsError, load_settings
from autotag.tokens import image_tokens, tokens_per_image

GOOD = {"DATABASE_URL": "postgresql://u:p@localhost/db", "OPENAI_API_KEY": "sk-1"}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # no .env of the developer's
    for name in ("DATABASE_URL", "SUPABASE_DB_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL", "SUPABASE_URL",
                 "SUPABASE_SECRET_KEY", "OPENAI_WEBHOOK_SECRET"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"DATABASE_URL": None}, "DATABASE_URL is not set"),
        ({"OPENAI_API_KEY": None}, "OPENAI_API_KEY is not set"),
        ({"OPENAI_API_KEY": ""}, "OPENAI_API_KEY is wrong"),
        ({"DATABASE_URL": "mysql://x"}, "DATABASE_URL is wrong"),
        ({"SUPABASE_URL": "project.supabase.co"}, "SUPABASE_URL is wrong: must start with https://"),
        ({"AUTOTAG_SLOTS": "many"}, "AUTOTAG_SLOTS is wrong"),
        ({"AUTOTAG_SLOTS": "0"}, "AUTOTAG_SLOTS is wrong"),
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
             "OPENAI_BASE_URL": "https://o.example.com/v1", "OPENAI_WEBHOOK_SECRET": "whsec_1"}  # fmt: skip
    for name, value in plain.items():
        monkeypatch.setenv(name, wrapped.format(value))
    settings = load_settings()
    assert settings.openai_api_key.get_secret_value() == "sk-1"
    assert settings.secret_key() == "sb_secret_1"
    assert settings.openai_webhook_secret
    assert settings.openai_webhook_secret.get_secret_value() == "whsec_1"
    assert (settings.supabase_url, settings.openai_base_url) == ("https://p.supabase.co", "https://o.example.com/v1")
    assert str(settings.database_url) == GOOD["DATABASE_URL"]


@pytest.mark.parametrize("inside", ["\n", "\r\n", " ", "\t", "\x1b[0m", "\x7f", "\u200b", "ü", "…"])
@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "SUPABASE_SECRET_KEY", "OPENAI_WEBHOOK_SECRET", "SUPABASE_URL"])
def test_a_key_or_url_in_two_pieces_is_one_sentence(name: str, inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = "https://topsecret" if name == "SUPABASE_URL" else "topsecret"
    for variable, value in {**GOOD, name: f"{start}{inside}hidden"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value).startswith(f"{name} is wrong: has a blank, a line break or another character inside")
    assert not any(part in str(caught.value) for part in ("topsecret", "hidden", "\n", "\x1b"))


LIMITS = {
    "x-ratelimit-limit-requests": "500", "x-ratelimit-remaining-requests": "499",
    "x-ratelimit-limit-tokens": "200000", "x-ratelimit-remaining-tokens": "0",
}  # fmt: skip


def test_limits_in_headers() -> None:
    assert provider.read_limits(LIMITS) == {
        "requests_limit": 500, "requests_left": 499, "tokens_limit": 200_000, "tokens_left": 0,
    }  # fmt: skip
    assert provider.read_limits({}) == {}
    assert provider.read_limits({**LIMITS, "x-ratelimit-limit-requests": "0"}) == {
        "tokens_limit": 200_000, "tokens_left": 0,
    }  # fmt: skip
    assert provider.read_limits({"x-ratelimit-remaining-requests": "-1", "x-ratelimit-limit-tokens": "lots"}) == {}


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0), ({"retry-after-ms": "250", "retry-after": "1"}, 0.25), ({}, None),
        ({"retry-after": "0"}, None), ({"retry-after": "-3"}, None), ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None), ({"retry-after": "inf"}, None), ({"retry-after": "86400"}, 120.0),
    ],
)  # fmt: skip
def test_retry_after_is_believed_only_when_it_makes_sense(headers: dict[str, str], seconds: float | None) -> None:
    assert provider.retry_after(headers) == seconds


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
        (400, {"error": {"message": "Something else."}}, "image", "request_refused"),
        (400, {"error": {"message": "Cannot find file file-1, or project p does not have access to it."}}, "transient",
         "file_not_there_yet"),
    ],
)  # fmt: skip
def test_errors_are_sorted_by_whose_they_are(status: int, body: object, kind: str, code: str) -> None:
    error = provider.classify_status(status, body, {})
    assert (error.kind, error.code) == (kind, code)


@pytest.mark.parametrize(
    ("model", "detail", "size", "tokens"),
    [
        ("gpt-4o-mini", "low", (512, 512), 2833),
        ("gpt-4o-mini", "high", (1024, 1024), 2833 + 4 * 5667),
        ("gpt-4.1-mini", "low", (512, 512), 415),
        ("gpt-4.1-mini-2025-04-14", "low", (512, 512), 415),
        ("gpt-4.1-nano", "low", (512, 512), 630),
        ("gpt-4.1", "low", (512, 512), 85),
        ("gpt-4.1-mini", "high", (4096, 4096), 2489),
        ("somebody-elses", "low", (512, 512), 2833),
    ],
)  # fmt: skip
def test_image_tokens(model: str, detail: str, size: tuple[int, int], tokens: int) -> None:
    assert image_tokens(model, detail, *size) == tokens  # type: ignore[arg-type]


def test_the_reservation_covers_the_worst_case() -> None:
    assert tokens_per_image("gpt-4.1-mini", "low", 400) >= 415 + 200 + 400
