"""The HTTP client below the SDK, which Storage is read with, too."""

from __future__ import annotations

from typing import Any

import aiohttp
import httpx2
from openai import DefaultAioHttpClient

#: What a request, or reading its answer, may raise. ClientError: aiohttp's own, of an answer that is no HTTP.
HTTP_ERRORS = (httpx2.HTTPError, aiohttp.ClientError)


def make_http(**options: Any) -> httpx2.AsyncClient:
    """A client with httpx2's interface and aiohttp's connections: its pool costs the same however many connections are
    in it; httpx2's own does not.

    Args:
        options: of `httpx2.AsyncClient`.
    """
    return DefaultAioHttpClient(**options)
