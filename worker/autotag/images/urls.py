"""Fetches images by URL: from allowed hosts with public addresses only, and with few redirects.

A retry downloads the whole image again. ``If-None-Match`` would save nothing, because a worker keeps no file between
two tries, and another worker may make the next try.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from types import TracebackType
from urllib.parse import urljoin, urlsplit

import httpcore
import httpx

import autotag
from autotag.errors import TaggingError, image_error
from autotag.images.addresses import GuardedBackend, invalid_url
from autotag.images.body import receive
from autotag.images.files import Download, ImageFile
from autotag.texts import printable
from autotag.waits import retry_after

FETCH_TIMEOUT = 30.0  # seconds to connect, and max seconds between two reads
REDIRECTS = 5
#: Image CDNs choose the format by this header. It names only formats that are cheap to decode: clients that name AVIF
#: or JPEG XL get them.
ACCEPT = "image/jpeg,image/png,image/webp;q=0.9,image/gif;q=0.8,image/*;q=0.5,*/*;q=0.1"
#: Hosts want a contact address in this header, and some (Wikimedia) refuse clients without one.
USER_AGENT = f"autotag/{autotag.__version__} (+https://pypi.org/project/supabase-autotag/)"
#: HTTP status of hosts that do not serve their images to others (hot-linking, a login)
REFUSED = (401, 402, 403, 407, 451)
BUSY_SECONDS = 30.0  # wait after a 429 without a time
#: If a host refuses for longer than this without serving an image, its images fail like others
MAX_BUSY_SECONDS = 3600.0


@dataclass
class _Busy:
    """A host that has asked to wait (times of ``time.monotonic()``)."""

    since: float
    until: float


class Urls:
    """Fetches images by their URLs.

    A host that asks to wait (429, or 503 with ``Retry-After``) gets no request until then. Its images wait, which does
    not count as a failure, and other hosts are not affected.
    """

    def __init__(self, hosts: frozenset[str], transport: httpx.AsyncBaseTransport | None = None) -> None:
        """
        Args:
            hosts: allowed hosts.
            transport: replaces the network, in tests.
        """
        self._hosts = hosts
        self._busy: dict[str, _Busy] = {}  # by allowed host
        if transport is None:
            transport = httpx.AsyncHTTPTransport()
            transport._pool = httpcore.AsyncConnectionPool(
                ssl_context=httpx.create_ssl_context(), network_backend=GuardedBackend(), max_connections=100
            )
        self._http = httpx.AsyncClient(
            transport=transport, timeout=FETCH_TIMEOUT, follow_redirects=False, trust_env=False,
            headers={"Accept": ACCEPT, "Accept-Encoding": "identity", "User-Agent": USER_AGENT},
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
            TaggingError: ``image`` if the address is refused or has no image; ``rate_limit`` if its host asks to wait;
                otherwise ``transient``.
        """
        try:
            async with download.in_time():
                return await self._follow(url, download)
        except TimeoutError:
            raise TaggingError("transient", "fetch_failed", "The image's host took too long.") from None

    async def _follow(self, url: str, download: Download) -> ImageFile:
        for _ in range(REDIRECTS + 1):
            host = self._check(url)
            if busy := self._busy_error(host):
                raise busy
            try:
                async with self._http.stream("GET", url) as response:
                    if response.is_redirect and "location" in response.headers:
                        url = urljoin(url, response.headers["location"])
                        continue
                    self._check_status(host, response)
                    return await receive(response, download)
            except (httpx.InvalidURL, ValueError):  # from parsing a URL or a redirect; includes UnicodeError (IDNA)
                raise invalid_url() from None
            except httpx.HTTPError as error:
                if isinstance(error.__context__, httpx.InvalidURL):  # httpx parsed the location of a redirect
                    raise invalid_url() from None
                raise TaggingError("transient", "fetch_failed", "The image's host did not answer.") from None
        raise image_error("fetch_failed", "The image's address redirects too often.")

    def _check(self, url: str) -> str:
        """Checks that this is an https URL of an allowed host, and returns the host.

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
        return host

    def _check_status(self, host: str, response: httpx.Response) -> None:
        """Checks that a response has an image, and notes whether its host asks to wait.

        Raises:
            TaggingError: the response has no image.
        """
        status, wait = response.status_code, retry_after(response.headers)
        if status == 429 or (status == 503 and wait):
            self._note_busy(host, wait or BUSY_SECONDS)
            if busy := self._busy_error(host):
                raise busy
        if status in (408, 425, 429) or status >= 500:
            raise TaggingError("transient", "fetch_failed", f"The image's host answered with an error ({status}).")
        self._busy.pop(host, None)
        if status in REFUSED:
            raise image_error(
                "host_refused", f"The host {host} does not give this image to other sites ({status}); upload the file."
            )
        if status != 200:
            raise image_error("file_missing", f"The image's address answered with status {status}.")

    def _note_busy(self, host: str, wait: float) -> None:
        now = time.monotonic()
        busy = self._busy.get(host)
        if busy is None or now - busy.until > MAX_BUSY_SECONDS:  # the first refusal, or the first one for a long time
            busy = self._busy[host] = _Busy(now, now)
        busy.until = now if now - busy.since > MAX_BUSY_SECONDS else max(busy.until, now + wait)

    def _busy_error(self, host: str) -> TaggingError | None:
        """The error of an image while its host asks to wait; None: the host may be asked."""
        busy = self._busy.get(host)
        wait = busy.until - time.monotonic() if busy else 0.0
        if wait <= 0:
            return None
        # The images are retried one after another, because all at once they would be refused again.
        return TaggingError(
            "rate_limit", "host_busy", f"The host {host} asks to wait before more images are fetched.",
            retry_after=wait * random.uniform(1, 2), origin="host",
        )  # fmt: skip
