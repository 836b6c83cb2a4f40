"""What ``autotag doctor`` tries of the AI provider: its address, the key and the model.

Nothing here costs anything: it asks for the model and for the list of models. Some providers have neither, and some do
not list what they answer to (Azure's deployments); there, calls that have worked say more.
"""

from __future__ import annotations

from autotag.config import DoctorSettings
from autotag.db import ModelStatus
from autotag.doctor.findings import Finding, compare_clocks
from autotag.errors import TaggingError
from autotag.openai.errors import NO_SUCH_ROUTE
from autotag.openai.provider import Provider

CHECK = "api"
TIMEOUT = 10.0  # seconds
LISTED = 8  # models that a provider has at most for a finding to name them
UNKNOWN_MODEL = (400, 403, 404)  # what providers answer that do not know a model, or do not tell
KEY_CODES = frozenset({"wrong_key", "invalid_api_key"})


async def check(settings: DoctorSettings, known: ModelStatus | None) -> Finding:
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
    async with Provider(key, url, TIMEOUT) as provider:
        try:
            if known is None:
                return _answered((await provider.list_models()).date, "The key is valid.")
            return await _ask(provider, known, works)
        except TaggingError as error:
            return _refused(error, url, works)


async def _ask(provider: Provider, known: ModelStatus, works: bool) -> Finding:
    """Asks for the model; where that says nothing, for the list of models.

    Raises:
        TaggingError: the list was refused too, or the model for another reason than that it is not known.
    """
    name = known["name"]
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
        return _unknown(known, listed.names, f"{provider.base_url}models")
    if model is None:
        return Finding(CHECK, "error", f"What answers at {provider.base_url} is no such API.", _address_fix())
    ends = model.shutdown_date
    end = f" and shuts down on {ends}" if ends and len(ends) == len("2027-01-14") else ""
    return _answered(model.date, f"The key is valid, and {name} is known{end}.")


def _answered(date: float | None, message: str) -> Finding:
    """All is well, unless the clocks differ. date: when the provider answered, by its own clock (epoch seconds)."""
    if date is not None:
        skew = compare_clocks(CHECK, "the provider", date)
        if skew.level != "ok":
            return skew
    return Finding(CHECK, "ok", message)


def _unknown(known: ModelStatus, names: list[str], url: str) -> Finding:
    """The account has models, but not this one."""
    successor = known["shutdown"]["successor"] if known["shutdown"] else None
    there = f" There are: {', '.join(sorted(names))}." if 0 < len(names) <= LISTED else ""
    if successor:  # statements to read; nobody runs them from here
        fix = f"Ask for its successor: update autotag.settings set model = '{successor}';"  # noqa: S608
    else:
        fix = f"Choose one that {url} lists: update autotag.settings set model = '…';"  # noqa: S608
    return Finding(CHECK, "error", f"{known['name']} is not known to this account.{there}", fix)


def _refused(error: TaggingError, url: str, works: bool) -> Finding:
    """The provider did not answer, or not to this question."""
    status = error.status
    if status == 401 or error.code in KEY_CODES:
        return Finding(CHECK, "error", f"The key is not valid: {error.message}", "Make a key and set OPENAI_API_KEY.")
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
    if error.kind == "account":
        return Finding(CHECK, "error", error.message, "Fix what it says.")
    return Finding(CHECK, "error", error.message, "Check OPENAI_BASE_URL and the network.")


def _address_fix() -> str:
    return "Check OPENAI_BASE_URL: most end in /v1."
