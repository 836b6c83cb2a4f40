"""The worker's settings, from environment variables (or a ``.env`` file).

Model, limits and strategy are columns of ``autotag.settings``. Only settings that can differ between worker processes
are here.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import string
from ipaddress import IPv6Address
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import (
    AliasChoices,
    Field,
    PostgresDsn,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, DotEnvSettingsSource, NoDecode, SettingsConfigDict

from autotag import connection_string
from autotag.redact import remember, remember_connection
from autotag.texts import printable

#: Characters that people often paste together with a key or URL: white space, quotes, and invisible characters.
PASTED = string.whitespace + "\u00a0\u200b\ufeff" + "\"'`“”‘’"
MIN_WEBHOOK_KEY = 16  # bytes; OpenAI's keys are longer
MIN_MEMORY = 250  # MB beside the largest file
#: In no host name, whatever its language.
NO_HOST = re.compile(r"""[\s/@:*?#"'`\\\[\]]|^\.|\.\.""")
#: Variables of earlier versions, and what to do instead.
GONE = {
    "AUTOTAG_IMAGE_MAX_PIXELS": "what is limited is not an image's pixels any more, but what decoding them takes; it "
    "must fit into AUTOTAG_MEMORY. Remove the variable",
}


def read_secret(value: str) -> str:
    """Returns a pasted secret without surrounding white space and quotes. ``@path`` reads it from a file.

    Raises:
        ValueError: the file cannot be read. The message continues a sentence and contains no part of the secret.
    """
    value = value.strip(PASTED)
    if value.startswith("@"):
        try:
            with open(value[1:], encoding="utf-8") as file:
                value = file.read().strip(PASTED)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ValueError(f"names a file that cannot be read ({reason})") from None
        if not value:
            raise ValueError("names a file that is empty")
    return value


def read_connection(value: str) -> str:
    """Like `read_secret`, for a connection string; returns a URL (`connection_string.read`).

    Raises:
        ValueError: the file or the connection string cannot be read. The message contains no part of the password.
    """
    return connection_string.read(read_secret(value))


class Settings(BaseSettings):
    """Settings of one worker process. Fields without an alias are read from ``AUTOTAG_<NAME>``."""

    model_config = SettingsConfigDict(
        env_prefix="AUTOTAG_", env_file=".env", env_file_encoding="utf-8-sig", extra="ignore", populate_by_name=True,
        allow_inf_nan=False,
    )  # fmt: skip
    role: ClassVar[str] = "autotag_worker"  # granted to the database's login

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
        description="base URL of that API",
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
        None,
        description="HOST:PORT to serve OpenAI's webhook on; needs OPENAI_WEBHOOK_SECRET; separate from AUTOTAG_HTTP",
    )
    slots: int = Field(256, ge=1, le=1000, description="max single calls in flight")
    batch_slots: int = Field(4, ge=1, le=50, description="max batches built or harvested concurrently")
    fetches: int = Field(16, ge=1, le=200, description="max images fetched concurrently for batches")
    image_hosts: Annotated[frozenset[str], NoDecode] = Field(
        frozenset(), description="hosts that image URLs may use, separated by commas"
    )
    image_max_bytes: int = Field(25_000_000, ge=1000, description="max size of an image file, in bytes")
    memory: int = Field(
        512, ge=300, le=1_000_000,
        description="MB of memory that the worker keeps itself within, with the processes that decode images",
    )  # fmt: skip
    storage_transform: bool = Field(
        False, description="1: Storage scales the images, if the project's plan includes image transformations"
    )
    call_timeout: float = Field(60, gt=0, description="timeout of one call to the AI provider, in seconds")
    stop_deadline: float = Field(25, ge=0, description="seconds that work in progress has to finish after SIGTERM")
    poll_interval: float = Field(5, gt=0, description="seconds between polls where LISTEN is impossible")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level to log")
    log_format: Literal["json", "console"] = Field("json", description="json (one object per line) or console")

    @field_validator("openai_base_url", "supabase_url", mode="before")
    @classmethod
    def _strip_pasted(cls, value: object) -> object:
        return value.strip(PASTED) if isinstance(value, str) else value

    @field_validator("*", mode="before")
    @classmethod
    def _read_secrets(cls, value: object, info: ValidationInfo) -> object:
        secret = info.field_name == "database_url" or _is_secret(cls, info)
        return read_secret(value) if secret and isinstance(value, str) else value

    @field_validator("database_url", mode="before")
    @classmethod
    def _of_postgres(cls, value: object) -> object:
        """Runs before pydantic's own validation, whose messages name drivers that this program does not have."""
        if isinstance(value, str):
            value = read_connection(value)
        return value

    def model_post_init(self, context: Any, /) -> None:
        """Registers the secrets, so that `redact` removes them from all messages."""
        remember(*(value.get_secret_value() for _, value in self if isinstance(value, SecretStr)))
        remember_connection(str(self.database_url))

    @field_validator("*")
    @classmethod
    def _check_secrets(cls, value: object) -> object:
        if isinstance(value, SecretStr) and not re.fullmatch(r"[!-~]*", value.get_secret_value()):
            raise ValueError(
                "contains a blank, a line break or another character that keys do not have; paste it again"
            )
        return value

    @field_validator("image_hosts", mode="before")
    @classmethod
    def _split_hosts(cls, value: object) -> object:
        if isinstance(value, str):
            return frozenset(host.strip().lower() for host in value.split(",") if host.strip())
        return value

    @field_validator("image_hosts")
    @classmethod
    def _check_hosts(cls, value: frozenset[str]) -> frozenset[str]:
        wrong = next((host for host in sorted(value) if NO_HOST.search(host) and not _is_ipv6(host)), None)
        if wrong is not None:
            raise ValueError(
                f"{printable(wrong, 100)} is not a host name; write it like images.example.com, without https://"
            )
        return frozenset(host.strip("[]") for host in value)  # a URL has an IPv6 address in brackets

    @field_validator("openai_base_url", "supabase_url")
    @classmethod
    def _check_http_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("must start with https:// (or http://)")
        # It is stored in the database, for status and doctor.
        if value is not None and "@" in value.split("//", 1)[1].split("/", 1)[0]:
            raise ValueError("has a user or password in it; put the key into its own variable")
        if value is not None and ("?" in value or "#" in value):
            raise ValueError("must not have a ? or # part; put the key into its own variable")
        if value is not None and not re.fullmatch(r"[!-~]*", value):
            raise ValueError(
                "contains a blank, a line break or another character that URLs do not have; paste it again"
            )
        return value.rstrip("/") if value else value

    @field_validator("http", "webhook")
    @classmethod
    def _check_host_and_port(cls, value: str | None) -> str | None:
        if value is not None:
            match = re.fullmatch(r"\S+:(\d{1,5})", value, re.ASCII)
            if not match or int(match[1]) > 65_535:
                raise ValueError("must be HOST:PORT, for example 0.0.0.0:8080")
        return value

    @model_validator(mode="after")
    def _check_webhook(self) -> Self:
        problem = webhook_problem(self)
        if problem:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _check_memory(self) -> Self:
        needed = MIN_MEMORY + self.image_max_bytes // 1_000_000
        if self.memory < needed:
            raise ValueError(
                f"AUTOTAG_MEMORY ({self.memory} MB) is too small for files of AUTOTAG_IMAGE_MAX_BYTES "
                f"({self.image_max_bytes:,}); set it to at least {needed}"
            )
        return self

    def memory_bytes(self) -> int:
        """`memory` in bytes."""
        return self.memory * 1_000_000

    def secret_key(self) -> str | None:
        """The project's secret key as plain text; None if it is not set."""
        return self.supabase_secret_key.get_secret_value() if self.supabase_secret_key else None


class DoctorSettings(Settings):
    """`Settings` for ``autotag doctor``, which reports a missing API key or a wrong webhook instead of refusing to
    start."""

    openai_api_key: SecretStr | None = Field(  # type: ignore[assignment]
        None, validation_alias=AliasChoices("AUTOTAG_OPENAI_API_KEY", "OPENAI_API_KEY")
    )

    @model_validator(mode="after")
    def _check_webhook(self) -> Self:
        return self


def _is_ipv6(host: str) -> bool:
    try:
        IPv6Address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


class OperatorSettings(DoctorSettings):
    """`DoctorSettings` for the commands that a worker's login may not run."""

    role = "autotag_operator"


class CompareSettings(Settings):
    """`Settings` for ``autotag compare``, which a worker's login may not run either."""

    role = "autotag_operator"


def webhook_problem(settings: Settings) -> str | None:
    """One sentence, without a full stop, about webhook settings that are insecure or incomplete; None if they are fine.

    An empty secret must be refused: anyone could sign deliveries with it.
    """
    secret = settings.openai_webhook_secret
    if secret is not None and not _is_webhook_secret(secret.get_secret_value()):
        return (
            f"OPENAI_WEBHOOK_SECRET does not look like one (whsec_ and at least {MIN_WEBHOOK_KEY} bytes in base64); "
            "copy it from the webhook in OpenAI's settings, or leave it unset"
        )
    if secret is not None and settings.webhook is None:
        return (
            "OPENAI_WEBHOOK_SECRET is set, but the webhook has no address; set it with --webhook "
            "HOST:PORT (AUTOTAG_WEBHOOK), or leave the secret unset"
        )
    if secret is None and settings.webhook is not None:
        return "--webhook (AUTOTAG_WEBHOOK) needs OPENAI_WEBHOOK_SECRET, the signing secret from OpenAI's settings"
    return None


def _is_webhook_secret(text: str) -> bool:
    key = text.removeprefix("whsec_")
    try:
        return key != text and len(base64.b64decode(key, validate=True)) >= MIN_WEBHOOK_KEY
    except binascii.Error:
        return False


def _is_secret(kind: type[Settings], info: ValidationInfo) -> bool:
    annotation = kind.model_fields[info.field_name or ""].annotation
    return SecretStr in (annotation, *get_args(annotation))


class SettingsError(Exception):
    """A setting is missing or wrong. The message is one sentence for the operator."""


S = TypeVar("S", bound=Settings)


def load_settings(kind: type[S] = Settings, **changes: Any) -> S:  # type: ignore[assignment]
    """Reads the settings.

    Args:
        kind: `Settings` or a subclass.
        changes: settings from the command line; they override the environment.

    Raises:
        SettingsError: a variable is missing or wrong. The message names the first one and its meaning.
    """
    present = {*os.environ}  # the names of the variables that are set
    try:
        present |= {name.upper() for name in DotEnvSettingsSource(kind).env_vars}
        for name, instead in GONE.items():
            if name in present:
                raise SettingsError(f"{name} is gone: {instead}.")
        return kind(**changes)
    except UnicodeDecodeError:
        raise SettingsError(
            "The file .env is not UTF-8 (PowerShell often writes UTF-16); save it again with the encoding UTF-8."
        ) from None
    except OSError as error:
        raise SettingsError(
            f"The file .env cannot be read ({error.strerror}); make it readable, or move it away."
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # the error is about several settings, and its message is complete
            raise SettingsError(f"{first['msg'].removeprefix('Value error, ')}.") from None
        location = str(first["loc"][0])
        for key, field in Settings.model_fields.items():
            names = environment_names(key, field)
            if location in (key, *names):
                # Name the variable that is set, or else the usual one, which is last.
                name = next((n for n in names if n in present), names[-1])
                meaning = f" ({field.description})".replace(Settings.role, kind.role)
                break
        else:
            name, meaning = location, ""
        if first["type"] == "missing":
            raise SettingsError(f"{name} is not set{meaning}.") from None
        raise SettingsError(f"{name} is wrong: {first['msg'].removeprefix('Value error, ')}{meaning}.") from None


def environment_names(key: str, field: FieldInfo) -> list[str]:
    """The environment variables that a field is read from."""
    alias = field.validation_alias
    return [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else [f"AUTOTAG_{key.upper()}"]
