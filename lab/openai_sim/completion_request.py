"""Parses a request for a completion and refuses what OpenAI, or the server that the plan describes, refuses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lab.openai_sim.models import Model, find, text_tokens
from lab.openai_sim.plan import Plan
from lab.openai_sim.protocol import ApiError, invalid
from lab.openai_sim.vision import BadPicture, measure

TOKEN_PARAMETERS = ("max_completion_tokens", "max_tokens")
SAMPLING = ("temperature", "top_p", "logprobs", "top_logprobs")  # refused when the model reasons
DETAILS = ("auto", "low", "high", "original")
FORMATS = ("json_object", "json_schema", "text")
TIERS = ("auto", "default", "flex", "priority", "fast")


@dataclass(frozen=True)
class CompletionRequest:
    """An accepted request."""

    model: Model
    effort: str | None = None  # reasoning effort; None: the model does not reason
    cap: int | None = None  # most output tokens, reasoning included
    tier: str = "default"  # the service tier that is billed
    format: str | None = None  # the type of response_format
    text_tokens: int = 0
    image_tokens: int = 0
    schema: str = ""  # the strict schema of the answer, as JSON
    prefix: str = ""  # hash of the model and all text before the first image
    prefix_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.text_tokens + self.image_tokens

    @property
    def metered(self) -> int:
        """The tokens that the limits count at admission: the prompt and the cap, not what the answer uses."""
        return self.prompt_tokens + (self.cap or 0)


@dataclass(frozen=True)
class _Image:
    """An image part and its position in the request."""

    message: int
    part: int
    spec: dict[str, Any]  # its image_url


def parse_request(body: dict[str, Any], plan: Plan, *, batch: bool = False) -> CompletionRequest:
    """Checks a request as the API does, except for the pixels of its picture.

    Args:
        body: the body of a request to ``/v1/chat/completions``.
        plan: the server to simulate.
        batch: whether the request is a line of a batch, which has no service tier.

    Raises:
        ApiError: 400, 404, 422 or 429.
    """
    model = find_model(body.get("model"), plan)
    if not plan.credit:
        raise no_credit()
    try:
        messages = list(_texts_and_images(body["messages"]))
    except (AttributeError, KeyError, TypeError):
        raise invalid("invalid_request_error", "messages", "The request is malformed.") from None
    effort = _effort(body, model, plan)
    _check_sampling(body, model, effort)
    cap = _cap(body, model, plan)
    tier = _tier(body, model, plan, batch)
    texts = [part for part in messages if isinstance(part, str)]
    images = [part for part in messages if isinstance(part, _Image)]
    form, schema = _format(body, texts, plan)
    for image in images:
        _check_image(image, model, plan)
    first = next((i for i, part in enumerate(messages) if isinstance(part, _Image)), len(messages))
    before = [str(part) for part in messages[:first]]
    return CompletionRequest(
        model, effort, cap, tier, form, schema=schema,
        text_tokens=_text_tokens(texts, schema),
        image_tokens=sum(_image_tokens(image, model) for image in images),
        prefix=hashlib.sha256(json.dumps([model.dated, schema, before]).encode()).hexdigest(),
        prefix_tokens=_text_tokens(before, schema),
    )  # fmt: skip


def first_image(body: dict[str, Any]) -> str | None:
    """The URL of the first image in a request; None when there is no image or the request is malformed."""
    try:
        parts = _texts_and_images(body["messages"])
        return next((str(part.spec["url"]) for part in parts if isinstance(part, _Image)), None)
    except (AttributeError, KeyError, TypeError):
        return None


def digest(body: dict[str, Any]) -> str:
    """A short hash of the picture in a request; empty when the request has no picture."""
    url = first_image(body)
    return hashlib.sha256(url.encode()).hexdigest()[:16] if url else ""


def find_model(name: object, plan: Plan) -> Model:
    """The model of a request.

    Raises:
        ApiError: 404 when this account does not have the model.
    """
    model = find(name)
    if plan.models is not None and name not in plan.models and (model is None or model.name not in plan.models):
        model = None
    elif model is None and plan.models is not None:
        model = Model(str(name))
    if model is None:
        raise ApiError(
            404, "model_not_found", f"The model `{name}` does not exist or you do not have access to it.",
            kind="invalid_request_error",
        )  # fmt: skip
    return model


def no_credit() -> ApiError:
    """The error for an account without credit."""
    return ApiError(
        429, "insufficient_quota", "You exceeded your current quota, please check your plan and billing details."
    )


def _texts_and_images(messages: list[dict[str, Any]]) -> Iterator[str | _Image]:
    """All texts and images of a request, in order."""
    for i, message in enumerate(messages):
        content = message["content"]
        if isinstance(content, str):
            yield content
            continue
        for j, part in enumerate(content):
            yield part["text"] + "" if part["type"] == "text" else _Image(i, j, dict(part["image_url"]))


def _text_tokens(texts: list[str], schema: str) -> int:
    """Tokens of the messages and of the answer's JSON schema."""
    return text_tokens(sum(map(len, texts))) + text_tokens(len(schema))


def _effort(body: dict[str, Any], model: Model, plan: Plan) -> str | None:
    effort = body.get("reasoning_effort")
    if effort is None:
        return model.default_effort
    if plan.effort_parameter is False:
        raise invalid("unknown_parameter", "reasoning_effort", "Unknown parameter: 'reasoning_effort'")
    if not model.reasons:
        if plan.effort_parameter:
            return None
        raise _unrecognized("reasoning_effort")
    if effort not in model.efforts:
        supported = ", ".join(f"'{supported_effort}'" for supported_effort in model.efforts)
        raise invalid(
            "unsupported_value", "reasoning_effort",
            f"Unsupported value: 'reasoning_effort' does not support '{effort}' with this model."
            f" Supported values are: {supported}.",
        )  # fmt: skip
    return str(effort)


def _check_sampling(body: dict[str, Any], model: Model, effort: str | None) -> None:
    for name in SAMPLING:
        if body.get(name) not in (None, False) and model.reasons and effort != "none":
            raise _unsupported(name)


def _cap(body: dict[str, Any], model: Model, plan: Plan) -> int | None:
    """The most tokens that the answer may have; None when the request does not limit them."""
    sent = [name for name in TOKEN_PARAMETERS if body.get(name) is not None]
    for name in sent:
        if plan.token_parameters is not None and name not in plan.token_parameters:
            raise _unrecognized(name)
        if plan.token_parameters is None and model.reasons and name == "max_tokens":
            raise _unsupported(name, " Use 'max_completion_tokens' instead.")
    if len(sent) > 1:
        raise invalid(
            "invalid_parameter_combination", "max_tokens",
            "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
        )  # fmt: skip
    cap = body[sent[0]] if sent else None
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 1):
        raise invalid("invalid_type", sent[0], f"Invalid value for '{sent[0]}': expected a positive integer.")
    return cap


def _tier(body: dict[str, Any], model: Model, plan: Plan, batch: bool) -> str:
    """The service tier that is billed: "default" where the model does not offer the requested one."""
    requested = body.get("service_tier") or "auto"
    if requested not in TIERS:
        raise invalid("invalid_value", "service_tier", f"Invalid value: '{requested}'.")
    tier = str(requested) if requested in model.tiers and not batch else "default"
    if tier == "flex" and not plan.flex_available:
        raise ApiError(
            429, "resource_unavailable", "Flex processing has no resources for this request right now. Try again later."
        )
    return tier


def _format(body: dict[str, Any], texts: list[str], plan: Plan) -> tuple[str | None, str]:
    """The type of the response_format, and its schema as JSON ("" without a schema)."""
    response_format = body.get("response_format")
    if response_format is None:
        return None, ""
    form = response_format.get("type") if isinstance(response_format, dict) else None
    if form not in FORMATS:
        raise invalid("invalid_value", "response_format.type", f"Invalid value: '{form}'.")
    if form not in plan.response_formats:
        error = ApiError(422, None, "")
        reason = f"response_format: response_format.type `{form}` is unavailable now"
        error.body = {"error": {"message": f"Failed to deserialize the JSON body: {reason}"}}
        raise error
    if form == "json_object" and not any("json" in text.lower() for text in texts):
        raise invalid(
            None, "messages",
            "'messages' must contain the word 'json' in some form, to use 'response_format' of type 'json_object'.",
        )  # fmt: skip
    if form != "json_schema":
        return form, ""
    json_schema = response_format.get("json_schema")
    schema = json_schema.get("schema") if isinstance(json_schema, dict) and json_schema.get("strict") else None
    if not isinstance(schema, dict) or schema.get("additionalProperties") is not False:
        raise invalid("invalid_request_error", "response_format", "response_format must be a strict JSON schema.")
    return form, json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


def _check_image(image: _Image, model: Model, plan: Plan) -> None:
    if not plan.vision:
        error = ApiError(400, None, "")
        error.body = {"error": "Model does not support images. Please use a model that does."}
        raise error
    if not model.vision:
        raise invalid(
            "invalid_value", f"messages.[{image.message}].content.[{image.part}].type",
            "Invalid content type. image_url is only supported by certain models.",
        )  # fmt: skip
    param, detail = f"messages[{image.message}].content[{image.part}].image_url.detail", image.spec.get("detail")
    if detail is not None and not plan.detail_parameter:
        raise invalid("unknown_parameter", param, f"Unknown parameter: '{param}'.")
    if detail is not None and detail not in DETAILS:
        raise invalid("invalid_value", param, f"Invalid value: '{detail}'.")


def _image_tokens(image: _Image, model: Model) -> int:
    try:
        return model.image_tokens(image.spec.get("detail") or "auto", *measure(str(image.spec.get("url"))))
    except BadPicture as error:
        raise ApiError(400, "invalid_image", str(error)) from None


def _unsupported(name: str, advice: str = "") -> ApiError:
    return invalid(
        "unsupported_parameter", name, f"Unsupported parameter: '{name}' is not supported with this model.{advice}"
    )


def _unrecognized(name: str) -> ApiError:
    """OpenAI's error for an argument that the model does not support has neither code nor param."""
    return invalid(None, None, f"Unrecognized request argument supplied: {name}")
