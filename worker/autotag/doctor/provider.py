"""Checks the AI provider for ``autotag doctor``: its address, the key and the model.

The checks cost nothing: they ask for the model and for the list of models. Some providers have neither endpoint, and
some do not list every model that they serve (Azure's deployments). Calls that have worked prove more there.
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
NO_SUCH_ROUTE = (404, 405, 501)  # HTTP status
MAX_LISTED = 8  # models; a longer list is not printed
KEY_CODES = frozenset({"wrong_key", "invalid_api_key"})


async def check(settings: DoctorSettings, model: dict[str, Any] | None) -> Finding:
    """Whether the provider answers, accepts the key and knows the model.

    Args:
        settings: with the provider's URL and key.
        model: the model as the database knows it (``model`` of ``autotag.status``); None: unknown.
    """
    if settings.openai_api_key is None:
        return Finding(CHECK, "error", "OPENAI_API_KEY is not set.",
                       "export OPENAI_API_KEY=…   (any word, for a server without keys)")  # fmt: skip
    key, url = settings.openai_api_key.get_secret_value(), settings.openai_base_url
    # Calls to this model have worked at this address.
    works = bool(model and model["proven"] and model["provider"]["base_url"] == url)
    async with provider.make_client(key, url, TIMEOUT) as client:
        try:
            if model is None:
                return _answered((await client.models.with_raw_response.list()).headers, "The key is valid.")
            return await _ask(client, model, works)
        except openai.APIError as error:
            return _refused(error, url, works)


async def _ask(client: AsyncOpenAI, model: dict[str, Any], works: bool) -> Finding:
    """Asks for the model, and for the list of models if the provider refuses that.

    Raises:
        openai.APIError: the list was refused too, or the provider failed for a reason that a list does not explain.
    """
    name = model["name"]
    try:
        raw = await client.models.with_raw_response.retrieve(name)
        described: object = raw.parse()
    except (openai.NotFoundError, openai.PermissionDeniedError, openai.BadRequestError):
        raw_list = await client.models.with_raw_response.list()
        names = [one.id for one in getattr(raw_list.parse(), "data", None) or []]
        if name in names or f"models/{name}" in names:  # Gemini lists its names with a prefix
            return _answered(raw_list.headers, f"The key is valid, and {name} is known.")
        if works:
            return Finding(CHECK, "ok", f"The provider does not list {name}, but calls to it work.")
        return _unknown(model, names, f"{client.base_url}models")
    if not isinstance(described, Model):
        return Finding(CHECK, "error", f"No OpenAI-compatible API answers at {client.base_url}.", _address_fix())
    ends = getattr(described, "shutdown_date", None)
    end = f" and shuts down on {ends}" if isinstance(ends, str) and len(ends) == len("2027-01-14") else ""
    return _answered(raw.headers, f"The key is valid, and {name} is known{end}.")


def _answered(headers: Any, message: str) -> Finding:
    """The provider answered: ok, unless the clocks differ."""
    with suppress(ValueError, TypeError):
        skew = compare_clocks(CHECK, "the provider", parsedate_to_datetime(headers.get("date", "")).timestamp())
        if skew.level != "ok":
            return skew
    return Finding(CHECK, "ok", message)


def _unknown(model: dict[str, Any], names: list[str], url: str) -> Finding:
    """The account has models, but not this one."""
    successor = (model["shutdown"] or {}).get("successor")
    others = f" It has: {', '.join(sorted(names))}." if 0 < len(names) <= MAX_LISTED else ""
    if successor:  # these statements are only printed
        fix = f"Use its successor: update autotag.settings set model = '{successor}';"  # noqa: S608
    else:
        fix = f"Choose a model that {url} lists: update autotag.settings set model = '…';"  # noqa: S608
    return Finding(CHECK, "error", f"This account does not have the model {model['name']}.{others}", fix)


def _refused(error: openai.APIError, url: str, works: bool) -> Finding:
    """The provider did not answer, or refused."""
    status = error.status_code if isinstance(error, openai.APIStatusError) else None
    problem = provider.classify(error)
    if status == 401 or problem.code in KEY_CODES:
        return Finding(CHECK, "error", f"The key is not valid: {problem.message}", "Set OPENAI_API_KEY to a valid key.")
    if works and (status in NO_SUCH_ROUTE or status == 403):
        return Finding(CHECK, "ok", f"The provider does not list its models ({status}), but calls work.")
    if status in NO_SUCH_ROUTE:
        return Finding(
            CHECK, "warning", f"{url} has no list of models ({status}): a wrong address, or a provider without one.",
            _address_fix() + " autotag status shows whether calls work.",
        )  # fmt: skip
    if status == 403:
        return Finding(
            CHECK, "warning", "The key may not list models (403); the first image will show whether it may make calls.",
            "Allow the key to list models, or ignore this warning.",
        )  # fmt: skip
    if problem.kind == "account":
        return Finding(CHECK, "error", problem.message, "Fix what the message says.")
    return Finding(CHECK, "error", problem.message, "Check OPENAI_BASE_URL and the network.")


def _address_fix() -> str:
    return "Check OPENAI_BASE_URL: most end with /v1."
