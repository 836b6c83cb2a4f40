"""Classifies errors of the SDK and of the HTTP client below it."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import openai

from autotag.errors import TaggingError
from autotag.openai.classify import classify_status
from autotag.openai.http import HTTP_ERRORS

#: Statuses of a server that does not have the route.
NO_SUCH_ROUTE = (404, 405, 501)


@contextmanager
def classified_errors() -> Iterator[None]:
    """Converts every exception of an SDK call to a `TaggingError`.

    Raises:
        TaggingError: classified by kind; ``status`` is the answer's, None without an answer.
    """
    try:
        yield
    except openai.APIError as error:
        raise classify(error) from None  # from None: tracebacks must not contain the provider's raw message
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):  # the SDK parses the answer
        raise no_answer() from None
    except HTTP_ERRORS:  # raised while a file is read; in requests, the SDK converts them
        raise _unreachable() from None


def classify(error: openai.APIError) -> TaggingError:
    """Classifies an error of the SDK."""
    if isinstance(error, openai.APIStatusError):
        return classify_status(error.status_code, _body(error), error.response.headers)
    reason: BaseException | None = error
    while reason is not None and not isinstance(reason, ssl.SSLError):
        reason = reason.__cause__ or reason.__context__
    if isinstance(error, openai.APITimeoutError):
        return TaggingError(
            "transient", "provider_unreachable", "The AI service could not be reached in time.", origin="provider"
        )
    if reason:  # retries do not help against an untrusted certificate
        message = "The AI service's certificate cannot be trusted."
        return TaggingError("account", "provider_unreachable", message, origin="provider")
    return _unreachable()


def no_answer() -> TaggingError:
    """The error of an answer with status 200 that cannot be parsed."""
    message = "The AI service gave no answer."
    return TaggingError("transient", "provider_error", message, origin="provider", status=200)


def classify_batch_error(error: TaggingError) -> TaggingError:
    """Changes a missing route into the error ``no_batch_api``, for errors of batches; returns other errors unchanged.

    A missing file or batch is not a missing route: the provider's message contains its id.
    """
    if (
        error.status in NO_SUCH_ROUTE and error.kind == "account"
        and not any(word in error.message.lower() for word in ("file-", "batch_"))
    ):  # fmt: skip
        return TaggingError("account", "no_batch_api", "The provider has no Batch API.", origin="provider")
    return error


def _unreachable() -> TaggingError:
    """The error of a reset connection, or of a reply that is not HTTP."""
    return TaggingError("transient", "provider_unreachable", "The AI service could not be reached.", origin="provider")


def _body(error: openai.APIStatusError) -> object:
    """The error object that the SDK found in the body, or else the whole body."""
    return error.body if error.body is not None else error.response.text
