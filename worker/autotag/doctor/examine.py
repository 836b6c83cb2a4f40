"""Checks every part of an installation from outside, and names a fix for each problem (``autotag doctor``).

``autotag.diagnose`` runs the checks that are possible inside the database. This module runs those that need a client:
the connection, notifications, a broadcast, Storage and the AI provider.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

import psycopg

import autotag
from autotag import db
from autotag.config import DoctorSettings, webhook_problem
from autotag.connection_string import how_to_reach
from autotag.doctor import broadcast, provider
from autotag.doctor.findings import Finding, compare_clocks, try_twice
from autotag.errors import TaggingError
from autotag.images.files import Download, Space
from autotag.images.storage import Storage
from autotag.install.facts import USE_SUPABASE, not_supabase, read_lacking_schemas
from autotag.redact import safe_message
from autotag.texts import name_some

CONNECT_TIMEOUT = 10  # seconds
WRITE_TIMEOUT = 5  # seconds; a worker does not wait longer for a row's triggers
APPLY_MIGRATIONS = "autotag migrate   (or: supabase db push, with --remote for the linked project)"
STORAGE_FIXES = {
    "storage_refused": "Set SUPABASE_SECRET_KEY to the project's secret key (Project Settings, API Keys).",
    "no_storage": "Set SUPABASE_URL to the project's URL (https://<ref>.supabase.co).",
    "storage_no_bucket": "Set SUPABASE_URL to the project of this database, or create the bucket.",
    "storage_error": "Check SUPABASE_URL and whether the project is paused, then run autotag doctor again.",
}


async def examine(settings: DoctorSettings, *, try_write: bool = False) -> list[Finding]:
    """Runs all checks, and returns their findings in display order. Failed checks are findings, too. try_write: write a
    row and roll back, even if that runs triggers of the project."""
    findings = []
    try:
        connection = await db.Operator.connect(str(settings.database_url), CONNECT_TIMEOUT)
    except psycopg.OperationalError as error:
        return [
            Finding(
                "connection", "error", f"The database cannot be reached: {safe_message(error)}",
                f"{how_to_reach(str(error))}.",
            ),
            await provider.check(settings, None),
        ]  # fmt: skip
    async with connection as database:
        findings.append(Finding("connection", "ok", f"Postgres {database.server_version} answers."))
        findings.append(await _pooler(settings))
        version = await _version(database, str(settings.database_url))
        findings.append(version)
        diagnosis: db.Diagnosis | None = None
        if version.level != "error":
            try:
                diagnosis = await database.diagnose()
            except psycopg.errors.InsufficientPrivilege:
                findings.append(
                    Finding("roles", "error", "The login may not call autotag's worker functions.",
                            f"grant autotag_worker to {settings.database_url.hosts()[0]['username'] or 'tagger'};")
                )  # fmt: skip
        if diagnosis:
            findings += [Finding(**finding) for finding in diagnosis["findings"]]
            findings.append(await _write(database, triggers=try_write))
            findings.append(compare_clocks("clock skew", "the database", diagnosis["now"]))
            findings.append(await broadcast.check(settings, database))
            findings.append(await _storage(settings, diagnosis["sample"]))
            findings += _storage_hosts(settings, diagnosis["storage_hosts"])
        findings.append(await provider.check(settings, await _model(database, diagnosis)))
        findings.append(_webhook(settings))
    return findings


async def _pooler(settings: DoctorSettings) -> Finding:
    if await db.can_listen(str(settings.database_url)):
        return Finding("pooler", "ok", "Notifications arrive (LISTEN works), so workers are woken at once.")
    return Finding(
        "pooler", "warning", "No notification arrives (a transaction pooler, port 6543?), so workers poll.",
        "Use the direct or the session-mode connection string (port 5432).",
    )  # fmt: skip


async def _version(database: db.Operator, url: str) -> Finding:
    try:
        version = await database.schema_version()
    except (psycopg.errors.InvalidSchemaName, psycopg.errors.UndefinedFunction):
        if "auth" in (lacking := await asyncio.to_thread(read_lacking_schemas, url)):
            return Finding("schema", "error", not_supabase(lacking), USE_SUPABASE)
        return Finding("schema", "error", "autotag's schema is not (completely) in this database.", APPLY_MIGRATIONS)
    except psycopg.errors.InsufficientPrivilege:
        return Finding("schema", "error", "The login may not use autotag's schema.", "grant autotag_worker to <login>;")
    if version != autotag.__version__:
        return Finding(
            "schema", "warning", f"The schema is of version {version}, this command of {autotag.__version__}.",
            APPLY_MIGRATIONS,
        )  # fmt: skip
    return Finding("schema", "ok", f"Version {version}, the same as here.")


async def _write(database: db.Operator, *, triggers: bool) -> Finding:
    try:
        async with asyncio.timeout(WRITE_TIMEOUT):
            return Finding(**await database.diagnose_write(triggers))
    except (TimeoutError, psycopg.Error) as error:  # a trigger that takes too long, or ends the session
        said = safe_message(error) or f"it took longer than {WRITE_TIMEOUT} s"
        return Finding("write", "error", f"A row could not be written: {said}", "Look at your table's triggers.")


async def _model(database: db.Operator, diagnosis: db.Diagnosis | None) -> db.ModelStatus | None:
    """The model that the settings name, as the database knows it (``model`` of ``autotag.status``); None: unknown."""
    if not diagnosis:
        return None
    try:
        model: db.ModelStatus = (await database.status())["model"]
    except psycopg.Error:  # diagnose() has already reported what is wrong
        return None
    # Workers may not have read the settings since they changed.
    proven = model["proven"] and model["name"] == diagnosis["model"]
    return {**model, "name": diagnosis["model"], "proven": proven}


async def _storage(settings: DoctorSettings, sample: db.StoredFile | None) -> Finding:
    """Checks whether the key can read Storage, and the newest image if there is one (``sample``)."""
    check, key = "storage", settings.secret_key()
    if not settings.supabase_url or not key:
        return Finding(
            check, "warning", "Images in Storage cannot be read: SUPABASE_URL and SUPABASE_SECRET_KEY are not set.",
            "Set both (not needed when all images have URLs).",
        )  # fmt: skip
    url, buckets = settings.supabase_url, frozenset[str]()

    async def probe() -> None:
        nonlocal buckets
        most = settings.image_max_bytes
        async with Storage(url, key, timeout=CONNECT_TIMEOUT) as storage, Download(Space(most), most) as download:
            buckets = await storage.buckets()
            if sample:
                await storage.read(sample["bucket"], sample["path"], download)

    try:
        await try_twice(probe)
    except TaggingError as error:
        if error.kind == "image" and sample:
            return _unreadable_sample(error, sample, buckets)
        return Finding(check, "error", error.message, STORAGE_FIXES[error.code])
    names = name_some(sorted(buckets)) or "none"
    return Finding(check, "ok", f"Readable; buckets: {names}." + (" The newest image could be read." if sample else ""))


def _storage_hosts(settings: DoctorSettings, hosts: Sequence[str]) -> list[Finding]:
    """A warning if SUPABASE_URL is not one of the hosts whose Storage URLs the adapter reads as files: one of them is
    wrong."""
    own = urlsplit(settings.supabase_url or "").netloc.lower().rpartition("@")[2]
    if not hosts or not own or re.sub(r":(443|80)$", "", own) in hosts:
        return []
    return [Finding(
        "storage hosts", "warning",
        f"SUPABASE_URL is {own}, but to the adapter this project's Storage is {name_some(sorted(hosts))}: images with"
        " URLs of another host are fetched, not read as files.",
        "Set SUPABASE_URL to this project, or change the adapter: autotag init --project-url <url> --file-rule <rule>",
    )]  # fmt: skip


def _unreadable_sample(error: TaggingError, sample: db.StoredFile, buckets: frozenset[str]) -> Finding:
    """The finding if the key works, but the newest image cannot be read, because of its bucket or because of this
    file."""
    check, bucket = "storage", sample["bucket"]
    if bucket not in buckets:
        names = name_some(sorted(buckets)) or "none"
        return Finding(
            check, "error",
            f"The key works, but the newest image names the bucket {bucket}, which does not exist (buckets: {names}).",
            f"Correct the bucket in the function autotag.describe_assets, or create the bucket {bucket}.",
        )  # fmt: skip
    return Finding(
        check, "warning",
        f"The key works and the bucket {bucket} exists, but the newest image ({sample['path']}) cannot be read:"
        f" {error.message}",
        "Upload the image again. If all images fail, correct the path in the function autotag.describe_assets.",
    )  # fmt: skip


def _webhook(settings: DoctorSettings) -> Finding:
    check = "webhook"
    problem = webhook_problem(settings)
    if problem:
        return Finding(
            check, "error", f"The worker will not start: {problem}.",
            "OPENAI_WEBHOOK_SECRET=whsec_… autotag worker --webhook 0.0.0.0:8081   "
            "(or set neither, and deploy the edge function openai-webhook)",
        )  # fmt: skip
    if settings.openai_webhook_secret is None:
        return Finding(check, "ok", "No OPENAI_WEBHOOK_SECRET: the end of a batch is noticed within a minute.")
    return Finding(check, "ok", f"A secret is set, and the worker serves /webhooks/openai on {settings.webhook}.")
