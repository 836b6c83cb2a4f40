"""The HTTP client below the SDK. `autotag.images.storage` uses it too."""

from __future__ import annotations

from typing import Any

import aiohttp
import httpx2
from openai import DefaultAioHttpClient

#: The exceptions of a request, and of reading its response. aiohttp.ClientError: the response is not valid HTTP.
HTTP_ERRORS = (httpx2.HTTPError, aiohttp.ClientError)
#: Seconds that a connection without a request is kept. Servers close it after 5 (uvicorn, which vLLM uses, and Node). A
#: request that is sent at that moment is lost, and nobody knows whether the server has read it.
KEEP_ALIVE = 4.0
MAX_CONNECTIONS = 1000  # the SDK's default


def make_http(connections: int = MAX_CONNECTIONS, **options: Any) -> httpx2.AsyncClient:
    """A client with httpx2's interface and aiohttp's connection pool. httpx2's own pool gets slower with the number of
    connections.

    Args:
        connections: max number of connections.
        options: arguments of `httpx2.AsyncClient`.
    """
    limits = httpx2.Limits(max_connections=connections, keepalive_expiry=KEEP_ALIVE)
    return DefaultAioHttpClient(limits=limits, **options)
