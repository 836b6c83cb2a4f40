"""Allows image fetches from public Internet addresses only, never from the worker's own networks (SSRF)."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from typing import Any

import httpcore

from autotag.errors import TaggingError, image_error
from autotag.texts import printable

#: IPv4 networks that are refused in addition to Python's ``is_global`` (IANA's "IPv4 Special-Purpose Address
#: Registry"; the cloud providers' documentation of their metadata services).
SPECIAL_IPV4 = tuple(map(ipaddress.IPv4Network, (
    "0.0.0.0/8", "100.64.0.0/10",  # the second contains Alibaba's metadata service, 100.100.100.200
    "168.63.129.16/32",  # Azure's wire server
    "169.254.0.0/16",  # link-local, with most metadata services at 169.254.169.254
    "192.0.0.0/24", "192.88.99.0/24",  # the second: 6to4 relays
    "198.18.0.0/15", "240.0.0.0/4",
)))  # fmt: skip
#: The only IPv6 range with public addresses (RFC 4291). Everything else is refused: IPv4-mapped and IPv4-compatible
#: addresses, NAT64 (64:ff9b::/96, 64:ff9b:1::/48), private (fc00::/7 with fd00:ec2::254), link-local and site-local.
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
#: Networks inside `GLOBAL_UNICAST` that are refused (IANA's "IPv6 Special-Purpose Address Registry").
SPECIAL_IPV6 = tuple(map(ipaddress.IPv6Network, (
    "2001::/23",  # protocols: Teredo (2001::/32), benchmarks, ORCHID
    "2001:db8::/32", "3fff::/20",  # documentation
    "2002::/16",  # 6to4
)))  # fmt: skip
ISATAP, ISATAP_MASK = 0x0000_5EFE, 0xFCFF_FFFF  # bits 32 to 63; the mask ignores the bits "universal" and "group"
METADATA_HOSTS = frozenset({
    "metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal",
})  # fmt: skip


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects to public addresses only.

    It connects to the address that was checked. A second DNS look-up could return another one.
    """

    def __init__(self) -> None:
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 (httpcore's interface)
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        address = await public_address(host, port)
        return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


async def public_address(host: str, port: int) -> str:
    """Resolves a host to the address to connect to.

    Raises:
        TaggingError: ``url_refused`` if any of the host's addresses is private, loopback, link-local or otherwise
            special, or if the name is invalid; ``host_not_found`` (transient) if it cannot be resolved.
    """
    if not host.isprintable():
        raise invalid_url()
    if host.rstrip(".").lower() in METADATA_HOSTS:
        raise _private()
    try:
        resolved = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise TaggingError(
            "transient", "host_not_found", f"The image's host {printable(host, 100)} could not be found."
        ) from None
    except (UnicodeError, ValueError):  # a label that is too long or empty, a NUL
        raise invalid_url() from None
    addresses = [ipaddress.ip_address(str(entry[4][0]).split("%")[0]) for entry in resolved]
    if not addresses or not all(is_public(address) for address in addresses):
        raise _private()
    return str(addresses[0])


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is a public Internet address.

    IPv6 addresses that embed an IPv4 address are always refused, because a translator may forward them to it.
    """
    if isinstance(address, ipaddress.IPv4Address):
        special = any(address in network for network in SPECIAL_IPV4)
        return address.is_global and not address.is_multicast and not special
    if address not in GLOBAL_UNICAST or any(address in network for network in SPECIAL_IPV6):
        return False
    return (int(address) >> 32) & ISATAP_MASK != ISATAP and address.is_global


def invalid_url() -> TaggingError:
    """The error of an image whose address is not a URL."""
    return image_error("url_refused", "The image's address is not a valid URL.")


def _private() -> TaggingError:
    return image_error("url_refused", "The image's address leads into a private network.")
