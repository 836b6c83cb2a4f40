"""The worker's settings, from environment variables (or a ``.env`` file).

Everything that decides how images are tagged (model, limits, strategy) is a column of ``autotag.settings``;
here is only what differs from one worker process to the next.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import string
from typing import Annotated, Any, Literal, Self, TypeVar

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from pydantic import AliasChoices, Field, PostgresDsn, SecretStr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from autotag.redact import remember, remember_connection

#: What comes along when a key or URL is pasted: blanks, line ends, quotes, and marks that nobody sees.
WRAPPING = string.whitespace + "\u00a0\u200b\ufeff" + "\"'`“”‘’"
WEBHOOK_KEY_LEAST = 16  # bytes; OpenAI's have more
URL_FORM = (
    # Not written as one URL, because the log replaces passwords in URLs by ***.
    "cannot be read as a connection string: postgresql:// and then user:password @ host:port/database without blanks,"
    " in which the characters @ : / ? # % of a password are written as %40 %3A %2F %3F %23 %25"
)


def read_secret(value: str) -> str:
    """A secret as it was pasted, or what stands in the file that ``@path`` names.

    Raises:
        ValueError: the file cannot be read; the message ends a sentence and has no part of it.
    """
    value = value.strip(WRAPPING)
    if value.startswith("@"):
        try:
            with open(value[1:], encoding="utf-8") as file:
                value = file.read().strip(WRAPPING)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise ValueError(f"names a file that cannot be read ({reason})") from None
        if not value:
            raise ValueError("names a file that is empty")
    return value


def read_connection(value: str) -> str:
    """The same for a connection string.

    Raises:
        ValueError: also when it cannot be parsed.
    """
    value = read_secret(value)
    check_connection(value)
    return value


def check_connection(value: str) -> None:
    """Refuses a connection string whose parts are not where they seem to be: libpq would name them in its errors.

    Raises:
        ValueError: with nothing of it in the message.
    """
    try:
        parts = conninfo_to_dict(value)
    except (ProgrammingError, UnicodeError):
        raise ValueError(URL_FORM) from None
    port = str(parts.get("port") or "")
    # An unescaped @ or / of a password ends up in the host, the port or the name of the database.
    misplaced = any("@" in str(parts.get(name) or "") for name in ("host", "dbname"))
    if misplaced or not re.fullmatch(r"[\d,]*", port):
        raise ValueError(URL_FORM)


class Settings(BaseSettings):
    """One worker process. Names without an alias are read with the prefix ``AUTOTAG_``."""

    model_config = SettingsConfigDict(env_prefix="AUTOTAG_", env_file=".env", extra="ignore", populate_by_name=True)

    database_url: PostgresDsn = Field(
        validation_alias=AliasChoices("AUTOTAG_DATABASE_URL", "SUPABASE_DB_URL", "DATABASE_URL"),
        description="Postgres, as a role that was granted autotag_worker; a direct or session-mode connection; or "
        "@FILE, which holds the URL",
    )
    openai_api_key: SecretStr = Field(
        min_length=1,
        validation_alias=AliasChoices("AUTOTAG_OPENAI_API_KEY", "OPENAI_API_KEY"),
        description="key of the OpenAI-compatible API, or @FILE",
    )
    openai_base_url: str = Field(
        "https://api.openai.com/v1",
        validation_alias=AliasChoices("AUTOTAG_OPENAI_BASE_URL", "OPENAI_BASE_URL"),
        description="where that API is",
    )
    supabase_url: str | None = Field(
        None,
        validation_alias=AliasChoices("AUTOTAG_SUPABASE_URL", "SUPABASE_URL"),
        description="the project's URL; needed for images in Storage",
    )
    supabase_secret_key: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices(
            "AUTOTAG_SUPABASE_SECRET_KEY", "SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY"
        ),
        description="the project's secret key, or @FILE; needed for images in Storage",
    )
    openai_webhook_secret: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("AUTOTAG_OPENAI_WEBHOOK_SECRET", "OPENAI_WEBHOOK_SECRET"),
        description="signing secret of OpenAI's webhook (whsec_…), or @FILE",
    )
    http: str | None = Field(None, description="HOST:PORT to serve health and metrics on")
    webhook: str | None = Field(
        None, description="HOST:PORT to serve OpenAI's webhook on, with its secret; a port of its own"
    )
    slots: int = Field(256, ge=1, le=1000, description="single calls in flight at most")
    batch_slots: int = Field(4, ge=1, le=50, description="batches built or harvested at the same time")
    fetches: int = Field(16, ge=1, le=200, description="images fetched at the same time for one batch")
    image_hosts: Annotated[frozenset[str], NoDecode] = Field(
        frozenset(), description="hosts that image URLs may name, separated by commas"
    )
    image_max_bytes: int = Field(25_000_000, ge=1000, description="largest image file, bytes")
    image_max_pixels: int = Field(100_000_000, ge=1000, description="largest image, pixels")
    call_timeout: float = Field(60, gt=0, description="seconds one call of the AI provider may take")
    stop_deadline: float = Field(25, ge=0, description="seconds that SIGTERM leaves to what is in hand")
    poll_interval: float = Field(5, gt=0, description="seconds between questions where LISTEN is impossible")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe line to log")
    log_format: Literal["json", "console"] = Field("json", description="json: an object a line")

    @field_validator("openai_base_url", "supabase_url", mode="before")
    @classmethod
    def _without_wrapping(cls, value: object) -> object:
        return value.strip(WRAPPING) if isinstance(value, str) else value

    @field_validator("database_url", "openai_api_key", "supabase_secret_key", "openai_webhook_secret", mode="before")
    @classmethod
    def _from_a_file(cls, value: object) -> object:
        return read_secret(value) if isinstance(value, str) else value

    @field_validator("database_url", mode="before")
    @classmethod
    def _of_postgres(cls, value: object) -> object:
        """Before pydantic, whose messages name drivers that this program does not have."""
        if isinstance(value, str):
            value = read_connection(value)
            if not value.startswith(("postgresql://", "postgres://")):
                raise ValueError("must start with postgresql://")
        return value

    @field_validator("database_url")
    @classmethod
    def _readable(cls, value: PostgresDsn) -> PostgresDsn:
        check_connection(str(value))
        return value

    def model_post_init(self, context: Any, /) -> None:
        """Has the secrets taken out of all messages from now on."""
        secrets = (self.openai_api_key, self.supabase_secret_key, self.openai_webhook_secret)
        remember(*(secret.get_secret_value() for secret in secrets if secret))
        remember_connection(str(self.database_url))

    @field_validator("openai_api_key", "supabase_secret_key", "openai_webhook_secret")
    @classmethod
    def _in_one_piece(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch(r"[!-~]*", value.get_secret_value()):
            raise ValueError("has a blank, a line break or another character inside that no key has; paste it again")
        return value

    @field_validator("image_hosts", mode="before")
    @classmethod
    def _split_hosts(cls, value: object) -> object:
        if isinstance(value, str):
            return frozenset(host.strip().lower() for host in value.split(",") if host.strip())
        return value

    @field_validator("openai_base_url", "supabase_url")
    @classmethod
    def _http_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("must start with https:// (or http://)")
        # It is stored in the database, for status and doctor.
        if value is not None and "@" in value.split("//", 1)[1].split("/", 1)[0]:
            raise ValueError("has a user or password in it; put the key into its own variable")
        if value is not None and ("?" in value or "#" in value):
            raise ValueError("must not have a ? or # part; put the key into its own variable")
        if value is not None and not re.fullmatch(r"[!-~]*", value):
            raise ValueError("has a blank, a line break or another character inside that no URL has; paste it again")
        return value.rstrip("/") if value else value

    @field_validator("http", "webhook")
    @classmethod
    def _host_and_port(cls, value: str | None) -> str | None:
        if value is not None:
            match = re.fullmatch(r"\S+:(\d{1,5})", value, re.ASCII)
            if not match or int(match[1]) > 65_535:
                raise ValueError("must be HOST:PORT, for example 0.0.0.0:8080")
        return value

    @model_validator(mode="after")
    def _webhook_is_whole(self) -> Self:
        trouble = webhook_trouble(self)
        if trouble:
            raise ValueError(trouble)
        return self

    def secret_key(self) -> str | None:
        """The project's secret key in the clear."""
        return self.supabase_secret_key.get_secret_value() if self.supabase_secret_key else None


class DoctorSettings(Settings):
    """The same for ``autotag doctor``, which reports a missing key instead of refusing to start."""

    openai_api_key: SecretStr | None = Field(  # type: ignore[assignment]
        None, validation_alias=AliasChoices("AUTOTAG_OPENAI_API_KEY", "OPENAI_API_KEY")
    )

    @model_validator(mode="after")
    def _webhook_is_whole(self) -> Self:
        return self


def webhook_trouble(settings: Settings) -> str | None:
    """Why the webhook of these settings could not be trusted or reached, if so; one sentence without its full stop.

    An empty secret signs as well as any other: whoever knows that it is empty would be believed.
    """
    secret = settings.openai_webhook_secret
    if secret is not None and not _is_webhook_secret(secret.get_secret_value()):
        return (
            f"OPENAI_WEBHOOK_SECRET does not look like one (whsec_ and at least {WEBHOOK_KEY_LEAST} bytes in base64); "
            "copy it from the webhook in OpenAI's settings, or leave it unset"
        )
    if secret is not None and settings.webhook is None:
        return (
            "OPENAI_WEBHOOK_SECRET is set, but the webhook has no address; say where to serve it with --webhook "
            "HOST:PORT (AUTOTAG_WEBHOOK), or leave the secret unset"
        )
    if secret is None and settings.webhook is not None:
        return "--webhook (AUTOTAG_WEBHOOK) needs OPENAI_WEBHOOK_SECRET, the signing secret from OpenAI's settings"
    return None


def _is_webhook_secret(text: str) -> bool:
    key = text.removeprefix("whsec_")
    try:
        return key != text and len(base64.b64decode(key, validate=True)) >= WEBHOOK_KEY_LEAST
    except binascii.Error:
        return False


class SettingsError(Exception):
    """A setting is missing or wrong; the message is one sentence for the operator."""


S = TypeVar("S", bound=Settings)


def load_settings(kind: type[S] = Settings, **changes: Any) -> S:  # type: ignore[assignment]
    """Reads the settings.

    Args:
        kind: of the settings.
        changes: settings that the command line names.

    Raises:
        SettingsError: names the first variable that is missing or wrong, and what it should be.
    """
    try:
        return kind(**changes)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # of no single setting: the message says all
            raise SettingsError(f"{first['msg'].removeprefix('Value error, ')}.") from None
        location = str(first["loc"][0])
        for key, field in Settings.model_fields.items():
            names = environment_names(key, field)
            if location in (key, *names):
                # The name that was used, or else the usual one, which stands last.
                name = next((n for n in names if n in os.environ), names[-1])
                what = f" ({field.description})"
                break
        else:
            name, what = location, ""
        if first["type"] == "missing":
            raise SettingsError(f"{name} is not set{what}.") from None
        raise SettingsError(f"{name} is wrong: {first['msg'].removeprefix('Value error, ')}{what}.") from None


def environment_names(key: str, field: FieldInfo) -> list[str]:
    """The environment variables that a field is read from."""
    alias = field.validation_alias
    return [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else [f"AUTOTAG_{key.upper()}"]
