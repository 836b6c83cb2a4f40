"""From where an image lies to the pixels that the model sees.

The model sees at most 512 pixels of an image's longer side (detail ``low``), so the worker scales it down and
sends it inline: the provider's own download of image URLs times out too often to rely on. What is sent is a
fresh JPEG: turned upright, without metadata, first frame only.
"""

from __future__ import annotations

import asyncio
import base64
import io
import ipaddress
import re
import socket
from collections.abc import Coroutine, Iterable
from http.cookiejar import DefaultCookiePolicy
from types import TracebackType
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore
import httpx
import pillow_heif
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError

from autotag.db import Image
from autotag.errors import TaggingError, image_error
from autotag.images.storage import Storage, file_missing, read_body
from autotag.texts import printable

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
JPEG_QUALITY = 85  # 512 px at 85 is 30–60 KB; more is no more to see
#: Pixels of an image's longer side beyond which the model sees no more, by detail (OpenAI's guide "Images and vision").
LARGEST_SIDE = {"low": 512, "high": 2048}
#: Scans of a progressive JPEG; encoders make about ten. Each goes over all pixels, and a hundred bytes make one.
SCANS_MOST = 100
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
FETCH_TIMEOUT = 30.0  # seconds that connecting, or a pause while reading, may take
FETCH_MOST = 120.0  # seconds that an image behind a URL may take in all: a host that drips would hold a place for ever
REDIRECTS = 3
PREPARE_THREADS = 2
FETCHES = 32  # files in memory at the same time, each of up to AUTOTAG_IMAGE_MAX_BYTES

#: Of IPv4, what Python's ``is_global`` lets through (IANA's "IPv4 Special-Purpose Address Registry"; the clouds'
#: documentation of their metadata services).
SPECIAL_IPV4 = tuple(map(ipaddress.IPv4Network, (
    "0.0.0.0/8", "100.64.0.0/10",  # the latter has Alibaba's metadata, 100.100.100.200
    "168.63.129.16/32",  # Azure's wire server
    "169.254.0.0/16",  # 169.254.169.254
    "192.0.0.0/24", "192.88.99.0/24",  # the latter: relays of 6to4
    "198.18.0.0/15", "240.0.0.0/4",
)))  # fmt: skip
#: Of IPv6, what is handed out (RFC 4291). Everything else is refused: addresses that are mapped or compatible with
#: IPv4, NAT64 (64:ff9b::/96, 64:ff9b:1::/48), private ones (fc00::/7 with fd00:ec2::254), link-local and site-local.
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
#: … and what is special inside it (IANA's "IPv6 Special-Purpose Address Registry").
SPECIAL_IPV6 = tuple(map(ipaddress.IPv6Network, (
    "2001::/23",  # protocols: Teredo (2001::/32), benchmarks, ORCHID
    "2001:db8::/32", "3fff::/20",  # documentation
    "2002::/16",  # 6to4
)))  # fmt: skip
ISATAP, ISATAP_MASK = 0x0000_5EFE, 0xFCFF_FFFF  # bits 32 to 63; the mask leaves out the bits "universal" and "group"
METADATA_HOSTS = frozenset({
    "metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal",
})  # fmt: skip

pillow_heif.register_heif_opener()
Pillow.MAX_IMAGE_PIXELS = None  # prepare() checks by its own limit, before anything is decoded


def prepare(data: bytes, largest_side: int, max_pixels: int) -> bytes:
    """A JPEG of at most ``largest_side`` pixels a side of whatever image file this is.

    Raises:
        TaggingError: of the image, with a sentence for the user: empty, no image, too large, damaged.
    """
    if not data:
        raise image_error("empty_file", "The file is empty.")
    try:
        image = Pillow.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise image_error(
                "image_too_large",
                f"The image has {width} × {height} pixels; at most {max_pixels // 1_000_000} million are accepted.",
            )
        if image.info.get("progressive") and _has_too_many_scans(data):
            raise image_error(
                "unsupported_format", f"The JPEG has more than {SCANS_MOST} scans; save it again with another program."
            )
        return _encode(image, largest_side)
    except UnidentifiedImageError:
        if _looks_like_svg(data):
            raise image_error("unsupported_format", "SVG drawings cannot be tagged; upload a PNG or JPEG.") from None
        if _claims_to_be_an_image(data):
            raise image_error(
                "unreadable_image", "The image file is damaged or of a kind that cannot be read."
            ) from None
        raise image_error("not_an_image", "The file is not an image.") from None
    except TaggingError:
        raise
    except Exception:  # noqa: BLE001
        # Decoders raise whatever comes to mind on broken files (OSError, SyntaxError, struct.error, …):
        # none of it may end more than this image.
        raise image_error("damaged_image", "The image file is damaged or incomplete.") from None


def _encode(image: Pillow.Image, largest_side: int) -> bytes:
    image.draft("RGB", (largest_side, largest_side))  # JPEG: decode at the nearest smaller scale
    image.seek(0)
    image.load()
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        low, high = image.getextrema()
        span = (float(high) - float(low)) or 1.0  # type: ignore[arg-type]
        image = image.convert("F").point(lambda v: (v - float(low)) * (255 / span)).convert("L")  # type: ignore[arg-type]
    # Hamming costs 40 % less than bicubic, and a model sees no difference.
    image.thumbnail((largest_side, largest_side), Pillow.Resampling.HAMMING, reducing_gap=2.0)
    image = ImageOps.exif_transpose(image)  # behind it, because it copies whatever it is given
    if image.has_transparency_data:
        upper = image.convert("RGBA")
        image = Pillow.new("RGB", image.size, "white")
        image.paste(upper, mask=upper.getchannel("A"))
    out = io.BytesIO()
    image = image.convert("RGB")
    image.info.clear()  # comments and the like would be written again
    image.save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


def _has_too_many_scans(data: bytes) -> bool:
    """Whether decoding a progressive JPEG could take minutes, which nothing could interrupt."""
    scans, at = 0, 2
    while scans <= SCANS_MOST and (found := _MARKER.search(data, at)):
        marker, at = found[1], found.end()
        if marker == b"\xd9":
            break
        scans += marker == b"\xda"
        at += int.from_bytes(data[at : at + 2], "big")
    return scans > SCANS_MOST


def _looks_like_svg(data: bytes) -> bool:
    return b"<svg" in data[:2000].lower()


def _claims_to_be_an_image(data: bytes) -> bool:
    """Whether the first bytes are those of a format we accept, so that what follows must be broken."""
    return data.startswith((b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")) or (
        data[:4] == b"RIFF" or data[4:8] == b"ftyp"
    )


def data_url(jpeg: bytes) -> str:
    """The form in which an image travels inside a request."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


class _GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects to public addresses only, and to the very address that was checked (no second look-up)."""

    def __init__(self) -> None:
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 (the interface of httpcore)
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        address = await public_address(host, port)
        return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


async def public_address(host: str, port: int) -> str:
    """The address to connect to for a host.

    Raises:
        TaggingError: ``url_refused`` when the name leads (also) to a private, loopback, link-local or
            otherwise special address, or is no name; transient when it cannot be resolved now.
    """
    if not host.isprintable():
        raise _no_url()
    if host.rstrip(".").lower() in METADATA_HOSTS:
        raise _private()
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise TaggingError(
            "transient", "host_not_found", f"The image's host {printable(host, 100)} could not be found."
        ) from None
    except (UnicodeError, ValueError):  # a label that is too long or empty, a NUL
        raise _no_url() from None
    addresses = [ipaddress.ip_address(str(entry[4][0]).split("%")[0]) for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise _private()
    return str(addresses[0])


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address belongs to the Internet, and to nothing inside or beside a network.

    Forms of IPv6 that contain an IPv4 address are refused whatever it is: a translator may stand behind them.
    """
    if isinstance(address, ipaddress.IPv4Address):
        special = any(address in network for network in SPECIAL_IPV4)
        return address.is_global and not address.is_multicast and not special
    if address not in GLOBAL_UNICAST or any(address in network for network in SPECIAL_IPV6):
        return False
    return (int(address) >> 32) & ISATAP_MASK != ISATAP and address.is_global


def _no_url() -> TaggingError:
    return image_error("url_refused", "The image's address is not a valid URL.")


def _private() -> TaggingError:
    return image_error("url_refused", "The image's address leads into a private network.")


class Images:
    """Fetches images from Storage and from allowed hosts, and prepares them."""

    def __init__(
        self,
        *,
        supabase_url: str | None,
        supabase_key: str | None,
        hosts: frozenset[str],
        max_bytes: int,
        max_pixels: int,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._hosts = hosts
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._threads = asyncio.Semaphore(PREPARE_THREADS)
        self._fetches = asyncio.Semaphore(FETCHES)
        if transport is None:
            transport = httpx.AsyncHTTPTransport()
            transport._pool = httpcore.AsyncConnectionPool(
                ssl_context=httpx.create_ssl_context(), network_backend=_GuardedBackend(), max_connections=100
            )
        self._http = httpx.AsyncClient(
            transport=transport, timeout=FETCH_TIMEOUT, follow_redirects=False, trust_env=False,
            headers={"Accept-Encoding": "identity"},
        )  # fmt: skip
        # A host that sets cookies for one image must not get them back with another workspace's.
        self._http.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._storage = Storage(supabase_url, supabase_key, max_bytes) if supabase_url and supabase_key else None

    async def __aenter__(self) -> Images:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()
        if self._storage is not None:
            await self._storage.__aexit__(kind, error, trace)

    async def load(self, image: Image, largest_side: int) -> bytes:
        """The prepared JPEG of an image.

        Raises:
            TaggingError: of the image, transient, or of the account (Storage's key or address is wrong).
        """
        async with self._fetches:
            if image.refused == "foreign_file":
                raise image_error("foreign_file", "The image's row names a file that does not belong to its workspace.")
            if image.refused == "location_too_long":
                raise image_error("location_too_long", "The URL, path or bucket name of the image is too long.")
            if image.refused is not None:  # said as if there were none: whether there is one is not theirs to know
                raise file_missing()
            if image.path is not None and image.bucket is not None:
                data = await self._from_storage(image.bucket, image.path)
            elif image.url is not None:
                data = await self._within_reason(self._from_url(image.url))
            else:
                raise image_error("asset_missing", "The image was deleted.")
            async with self._threads:
                return await asyncio.to_thread(prepare, data, largest_side, self._max_pixels)

    async def _within_reason(self, fetching: Coroutine[Any, Any, bytes]) -> bytes:
        try:
            async with asyncio.timeout(FETCH_MOST):
                return await fetching
        except TimeoutError:
            raise TaggingError("transient", "fetch_failed", "The image's host took too long.") from None

    async def _from_storage(self, bucket: str, path: str) -> bytes:
        if self._storage is None:
            raise TaggingError(
                "account", "no_storage", "SUPABASE_URL and SUPABASE_SECRET_KEY are not set, so Storage is out of reach."
            )
        return await self._storage.read(bucket, path)

    async def _from_url(self, url: str) -> bytes:
        for _ in range(REDIRECTS + 1):
            self.check_url(url)
            try:
                async with self._http.stream("GET", url) as response:
                    if response.is_redirect and "location" in response.headers:
                        url = urljoin(url, response.headers["location"])
                        continue
                    return await self._read(response)
            except (httpx.InvalidURL, ValueError):  # whatever parses a URL or a redirect, and UnicodeError of IDNA
                raise _no_url() from None
            except httpx.HTTPError as error:
                if isinstance(error.__context__, httpx.InvalidURL):  # httpx has looked at a redirect's location
                    raise _no_url() from None
                raise TaggingError("transient", "fetch_failed", "The image's host did not answer.") from None
        raise image_error("fetch_failed", "The image's address redirects too often.")

    def check_url(self, url: str) -> None:
        """Refuses what is not an https URL of an allowed host.

        Raises:
            TaggingError: ``url_refused``.
        """
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError:
            raise _no_url() from None
        if parts.scheme != "https" or port not in (None, 443) or parts.username or parts.password:
            raise image_error("url_refused", "The image's address is not a plain https URL.")
        if not host:
            raise _no_url()
        if host not in self._hosts:
            raise image_error("url_refused", f"Images from the host {printable(host, 100)} are not allowed here.")

    async def _read(self, response: httpx.Response) -> bytes:
        status = response.status_code
        if status in (408, 429) or status >= 500:
            raise TaggingError("transient", "fetch_failed", f"The image's host answered with an error ({status}).")
        if status != 200:
            raise image_error("file_missing", f"The image's address answered with status {status}.")
        return await read_body(response, self._max_bytes)
