"""What an error of the SDK, or of the HTTP client below it, means."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import openai

from autotag.errors import TaggingError
from autotag.openai.classify import classify_status
from autotag.openai.http import HTTP_ERRORS

#: What a server answers that has no such route.
NO_SUCH_ROUTE = (404, 405, 501)


@contextmanager
def classified_errors() -> Iterator[None]:
    """Turns whatever a call of the SDK raises into an error of ours.

    Raises:
        TaggingError: sorted by kind, with the answer's ``status``, if there was an answer.
    """
    try:
        yield
    except openai.APIError as error:
        raise classify(error) from None  # traces and logs need not repeat the provider's own words
    except json.JSONDecodeError:
        raise no_answer() from None
    except HTTP_ERRORS:  # while a file is read; of requests, the SDK translates them
        raise _unreachable() from None


def classify(error: openai.APIError) -> TaggingError:
    """Sorts an error of the SDK into the kinds that the database knows."""
    if isinstance(error, openai.APIStatusError):
        return classify_status(error.status_code, _body(error), error.response.headers)
    reason: BaseException | None = error
    while reason is not None and not isinstance(reason, ssl.SSLError):
        reason = reason.__cause__ or reason.__context__
    if isinstance(error, openai.APITimeoutError):
        return TaggingError(
            "transient", "provider_unreachable", "The AI service could not be reached in time.", origin="provider"
        )
    if reason:  # a certificate that nobody trusts will not be better in a minute
        message = "The AI service's certificate cannot be trusted."
        return TaggingError("account", "provider_unreachable", message, origin="provider")
    return _unreachable()


def no_answer() -> TaggingError:
    """The error of an answer with status 200 that cannot be read."""
    return TaggingError("transient", "provider_error", "The AI service gave no answer.", origin="provider")


def classify_batch_error(error: TaggingError) -> TaggingError:
    """What an error means that a batch ran into: like any other, but a route that is missing is a missing Batch API.
    A file or batch that is missing is named in the message."""
    if (
        error.status in NO_SUCH_ROUTE and error.kind == "account"
        and not any(word in error.message.lower() for word in ("file-", "batch_"))
    ):  # fmt: skip
        return TaggingError("account", "no_batch_api", "The provider has no Batch API.", origin="provider")
    return error


def _unreachable() -> TaggingError:
    """The error of a connection that was reset, or of an answer that is no HTTP."""
    return TaggingError("transient", "provider_unreachable", "The AI service could not be reached.", origin="provider")


def _body(error: openai.APIStatusError) -> object:
    """The whole body where the SDK found no error object in it."""
    return error.body if error.body is not None else error.response.text
