"""Which addresses of the Internet an image may be fetched from: none inside or beside a network of ours."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from typing import Any

import httpcore

from autotag.errors import TaggingError, image_error
from autotag.texts import printable

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


class GuardedBackend(httpcore.AsyncNetworkBackend):
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
        raise no_url()
    if host.rstrip(".").lower() in METADATA_HOSTS:
        raise _private()
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise TaggingError(
            "transient", "host_not_found", f"The image's host {printable(host, 100)} could not be found."
        ) from None
    except (UnicodeError, ValueError):  # a label that is too long or empty, a NUL
        raise no_url() from None
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


def no_url() -> TaggingError:
    """The error of an image whose address is none."""
    return image_error("url_refused", "The image's address is not a valid URL.")


def _private() -> TaggingError:
    return image_error("url_refused", "The image's address leads into a private network.")
