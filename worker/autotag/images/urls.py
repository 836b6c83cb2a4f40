"""Fetches images by URL: from allowed hosts with public addresses only, and with few redirects."""

from __future__ import annotations

import asyncio
from http.cookiejar import DefaultCookiePolicy
from types import TracebackType
from urllib.parse import urljoin, urlsplit

import httpcore
import httpx

from autotag.errors import TaggingError, image_error
from autotag.images.addresses import GuardedBackend, invalid_url
from autotag.images.body import receive
from autotag.images.files import Download, ImageFile
from autotag.texts import printable

FETCH_TIMEOUT = 30.0  # seconds to connect, and max seconds between two reads
MAX_FETCH_SECONDS = 120.0  # total time of one image; otherwise a host that sends slowly could occupy a slot endlessly
REDIRECTS = 3


class Urls:
    """Fetches images by their URLs."""

    def __init__(self, hosts: frozenset[str], transport: httpx.AsyncBaseTransport | None = None) -> None:
        """
        Args:
            hosts: allowed hosts.
            transport: replaces the network, in tests.
        """
        self._hosts = hosts
        if transport is None:
            transport = httpx.AsyncHTTPTransport()
            transport._pool = httpcore.AsyncConnectionPool(
                ssl_context=httpx.create_ssl_context(), network_backend=GuardedBackend(), max_connections=100
            )
        self._http = httpx.AsyncClient(
            transport=transport, timeout=FETCH_TIMEOUT, follow_redirects=False, trust_env=False,
            headers={"Accept-Encoding": "identity"},
        )  # fmt: skip
        # No cookies: a host could use them to link the images of different workspaces.
        self._http.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))

    async def __aenter__(self) -> Urls:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def fetch(self, url: str, download: Download) -> ImageFile:
        """Fetches an image file.

        Raises:
            TaggingError: ``image`` if the address is refused or has no image; otherwise ``transient``.
        """
        try:
            async with asyncio.timeout(MAX_FETCH_SECONDS):
                return await self._follow(url, download)
        except TimeoutError:
            raise TaggingError("transient", "fetch_failed", "The image's host took too long.") from None

    async def _follow(self, url: str, download: Download) -> ImageFile:
        for _ in range(REDIRECTS + 1):
            self._check(url)
            try:
                async with self._http.stream("GET", url) as response:
                    if response.is_redirect and "location" in response.headers:
                        url = urljoin(url, response.headers["location"])
                        continue
                    return await self._read(response, download)
            except (httpx.InvalidURL, ValueError):  # from parsing a URL or a redirect; includes UnicodeError (IDNA)
                raise invalid_url() from None
            except httpx.HTTPError as error:
                if isinstance(error.__context__, httpx.InvalidURL):  # httpx parsed the location of a redirect
                    raise invalid_url() from None
                raise TaggingError("transient", "fetch_failed", "The image's host did not answer.") from None
        raise image_error("fetch_failed", "The image's address redirects too often.")

    def _check(self, url: str) -> None:
        """Checks that this is an https URL of an allowed host.

        Raises:
            TaggingError: ``url_refused``.
        """
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError:
            raise invalid_url() from None
        if parts.scheme != "https" or port not in (None, 443) or parts.username or parts.password:
            raise image_error("url_refused", "The image's address is not a plain https URL.")
        if not host:
            raise invalid_url()
        if host not in self._hosts:
            raise image_error("url_refused", f"Images from the host {printable(host, 100)} are not allowed here.")

    async def _read(self, response: httpx.Response, download: Download) -> ImageFile:
        status = response.status_code
        if status in (408, 429) or status >= 500:
            raise TaggingError("transient", "fetch_failed", f"The image's host answered with an error ({status}).")
        if status != 200:
            raise image_error("file_missing", f"The image's address answered with status {status}.")
        return await receive(response, download)
