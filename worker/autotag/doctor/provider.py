"""Checks the AI provider for ``autotag doctor``: its address, the key and the model.

The checks cost nothing: they only request the model and the list of models. Some providers have neither endpoint, and
some do not list all of their models (Azure's deployments). For these, calls that have worked are better evidence.
"""

from __future__ import annotations

from autotag.config import DoctorSettings
from autotag.db import ModelStatus
from autotag.doctor.findings import Finding, compare_clocks, try_twice
from autotag.errors import TaggingError
from autotag.openai.errors import NO_SUCH_ROUTE
from autotag.openai.provider import Provider

CHECK = "api"
TIMEOUT = 10.0  # seconds
MAX_LISTED = 8  # models; a longer list is not printed
UNKNOWN_MODEL = (400, 403, 404)  # HTTP statuses of providers that do not know a model, or do not say whether they do
KEY_CODES = frozenset({"wrong_key", "invalid_api_key"})


async def check(settings: DoctorSettings, model_status: ModelStatus | None) -> Finding:
    """Whether the provider answers, accepts the key and knows the model.

    Args:
        settings: with the provider's URL and key.
        model_status: the model as the database knows it (``model`` of ``autotag.status``); None: unknown.
    """
    if settings.openai_api_key is None:
        return Finding(CHECK, "error", "OPENAI_API_KEY is not set.",
                       "export OPENAI_API_KEY=…   (any word, for a server without keys)")  # fmt: skip
    key, url = settings.openai_api_key.get_secret_value(), settings.openai_base_url
    # Calls to this model have worked at this address.
    works = bool(model_status and model_status["proven"] and model_status["provider"]["base_url"] == url)
    async with Provider(key, url, TIMEOUT) as provider:
        try:
            if model_status is None:
                return _answered((await try_twice(provider.list_models)).date, "The key is valid.")
            return await try_twice(lambda: _ask(provider, model_status, works))
        except TaggingError as error:
            return _refused(error, url, works)


async def _ask(provider: Provider, model_status: ModelStatus, works: bool) -> Finding:
    """Requests the model or, if the provider refuses that, the list of models.

    Raises:
        TaggingError: the list was refused too, or the provider failed for a reason that a list does not explain.
    """
    name = model_status["name"]
    try:
        model = await provider.retrieve_model(name)
    except TaggingError as error:
        if error.status not in UNKNOWN_MODEL:
            raise
        listed = await provider.list_models()
        if name in listed.names or f"models/{name}" in listed.names:  # Gemini lists its names with a prefix
            return _answered(listed.date, f"The key is valid, and {name} is known.")
        if works:
            return Finding(CHECK, "ok", f"The provider does not list {name}, but calls to it work.")
        return _unknown(model_status, listed.names, f"{provider.base_url}models")
    if model is None:
        return Finding(CHECK, "error", f"No OpenAI-compatible API answers at {provider.base_url}.", _address_fix())
    ends = model.shutdown_date
    end = f" and shuts down on {ends}" if ends and len(ends) == len("2027-01-14") else ""
    return _answered(model.date, f"The key is valid, and {name} is known{end}.")


def _answered(date: float | None, message: str) -> Finding:
    """The finding if the provider answered: ok, unless the clocks differ. date: by the provider's clock (epoch
    seconds)."""
    if date is not None:
        skew = compare_clocks(CHECK, "the provider", date)
        if skew.level != "ok":
            return skew
    return Finding(CHECK, "ok", message)


def _unknown(model_status: ModelStatus, names: list[str], url: str) -> Finding:
    """The finding if the account has models, but not this one."""
    successor = model_status["shutdown"]["successor"] if model_status["shutdown"] else None
    others = f" It has: {', '.join(sorted(names))}." if 0 < len(names) <= MAX_LISTED else ""
    if successor:  # these statements are only printed
        fix = f"Use its successor: update autotag.settings set model = '{successor}';"  # noqa: S608
    else:
        fix = f"Choose a model that {url} lists: update autotag.settings set model = '…';"  # noqa: S608
    return Finding(CHECK, "error", f"This account does not have the model {model_status['name']}.{others}", fix)


def _refused(error: TaggingError, url: str, works: bool) -> Finding:
    """The finding if the provider did not answer, or refused."""
    status = error.status
    if status == 401 or error.code in KEY_CODES:
        return Finding(CHECK, "error", f"The key is not valid: {error.message}", "Set OPENAI_API_KEY to a valid key.")
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
    if error.kind == "account":
        return Finding(CHECK, "error", error.message, "Fix what the message says.")
    return Finding(CHECK, "error", error.message, "Check OPENAI_BASE_URL and the network.")


def _address_fix() -> str:
    return "Check OPENAI_BASE_URL: most end with /v1."
