"""The HTTP client below the SDK. `autotag.images.storage` uses it too."""

from __future__ import annotations

from typing import Any

import aiohttp
import httpx2
from openai import DefaultAioHttpClient

#: The exceptions of a request, and of reading its response. aiohttp.ClientError: the response is not valid HTTP.
HTTP_ERRORS = (httpx2.HTTPError, aiohttp.ClientError)


def make_http(**options: Any) -> httpx2.AsyncClient:
    """A client with httpx2's interface and aiohttp's connection pool. The cost of httpx2's own pool grows with the
    number of connections.

    Args:
        options: arguments of `httpx2.AsyncClient`.
    """
    return DefaultAioHttpClient(**options)
