"""What ``autotag doctor`` tries of the AI provider: its address, the key and the model.

Nothing here costs anything: it asks for the model and for the list of models. Some providers have neither, and some do
not list what they answer to (Azure's deployments); there, calls that have worked say more.
"""

from __future__ import annotations

from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

import openai
from openai import AsyncOpenAI
from openai.types import Model

from autotag.config import DoctorSettings
from autotag.doctor.findings import Finding, compare_clocks
from autotag.openai import provider

CHECK = "api"
TIMEOUT = 10.0  # seconds
NO_SUCH_ROUTE = (404, 405, 501)
LISTED = 8  # models that a provider has at most for a finding to name them
KEY_CODES = frozenset({"wrong_key", "invalid_api_key"})


async def check(settings: DoctorSettings, known: dict[str, Any] | None) -> Finding:
    """Whether the provider answers, takes the key and knows the model.

    Args:
        settings: with its address and key.
        known: the model as the database knows it (``model`` of ``autotag.status``); None: nothing is known.
    """
    if settings.openai_api_key is None:
        return Finding(CHECK, "error", "OPENAI_API_KEY is not set.",
                       "export OPENAI_API_KEY=…   (any word for a server that has no keys)")  # fmt: skip
    key, url = settings.openai_api_key.get_secret_value(), settings.openai_base_url
    # Calls have worked with this model, at this address.
    works = bool(known and known["proven"] and known["provider"]["base_url"] == url)
    async with provider.make_client(key, url, TIMEOUT) as client:
        try:
            if known is None:
                return _answered((await client.models.with_raw_response.list()).headers, "The key is valid.")
            return await _ask(client, known, works)
        except openai.APIError as error:
            return _refused(error, url, works)


async def _ask(client: AsyncOpenAI, known: dict[str, Any], works: bool) -> Finding:
    """Asks for the model; where that says nothing, for the list of models.

    Raises:
        openai.APIError: the list was refused too, or the model for another reason than that it is not known.
    """
    name = known["name"]
    try:
        raw = await client.models.with_raw_response.retrieve(name)
        model: object = raw.parse()
    except (openai.NotFoundError, openai.PermissionDeniedError, openai.BadRequestError):
        raw_list = await client.models.with_raw_response.list()
        names = [one.id for one in getattr(raw_list.parse(), "data", None) or []]
        if name in names or f"models/{name}" in names:  # Gemini lists its names with a prefix
            return _answered(raw_list.headers, f"The key is valid, and {name} is known.")
        if works:
            return Finding(CHECK, "ok", f"The provider does not list {name}, but calls to it work.")
        return _unknown(known, names, f"{client.base_url}models")
    if not isinstance(model, Model):
        return Finding(CHECK, "error", f"What answers at {client.base_url} is no such API.", _address_fix())
    ends = getattr(model, "shutdown_date", None)
    end = f" and shuts down on {ends}" if isinstance(ends, str) and len(ends) == len("2027-01-14") else ""
    return _answered(raw.headers, f"The key is valid, and {name} is known{end}.")


def _answered(headers: Any, message: str) -> Finding:
    """All is well, unless the clocks differ."""
    with suppress(ValueError, TypeError):
        skew = compare_clocks(CHECK, "the provider", parsedate_to_datetime(headers.get("date", "")).timestamp())
        if skew.level != "ok":
            return skew
    return Finding(CHECK, "ok", message)


def _unknown(known: dict[str, Any], names: list[str], url: str) -> Finding:
    """The account has models, but not this one."""
    successor = (known["shutdown"] or {}).get("successor")
    there = f" There are: {', '.join(sorted(names))}." if 0 < len(names) <= LISTED else ""
    if successor:  # statements to read; nobody runs them from here
        fix = f"Ask for its successor: update autotag.settings set model = '{successor}';"  # noqa: S608
    else:
        fix = f"Choose one that {url} lists: update autotag.settings set model = '…';"  # noqa: S608
    return Finding(CHECK, "error", f"{known['name']} is not known to this account.{there}", fix)


def _refused(error: openai.APIError, url: str, works: bool) -> Finding:
    """The provider did not answer, or not to this question."""
    status = error.status_code if isinstance(error, openai.APIStatusError) else None
    trouble = provider.classify(error)
    if status == 401 or trouble.code in KEY_CODES:
        return Finding(CHECK, "error", f"The key is not valid: {trouble.message}", "Make a key and set OPENAI_API_KEY.")
    if works and (status in NO_SUCH_ROUTE or status == 403):
        return Finding(CHECK, "ok", f"The provider has no list of models for us ({status}), but calls work.")
    if status in NO_SUCH_ROUTE:
        return Finding(
            CHECK, "warning", f"{url} has no list of models ({status}): a wrong address, or a provider that has none.",
            _address_fix() + " autotag status says whether calls work.",
        )  # fmt: skip
    if status == 403:
        return Finding(
            CHECK, "warning", "The key may not list models (403); the first image shows whether it may make calls.",
            "Give the key the right to list models, or leave it.",
        )  # fmt: skip
    if trouble.kind == "account":
        return Finding(CHECK, "error", trouble.message, "Fix what it says.")
    return Finding(CHECK, "error", trouble.message, "Check OPENAI_BASE_URL and the network.")


def _address_fix() -> str:
    return "Check OPENAI_BASE_URL: most end in /v1."
