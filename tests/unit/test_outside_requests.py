"""An image's URL makes the worker request only public addresses of allowed hosts, and read no more than the limit."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable
from ipaddress import IPv4Address, IPv6Address

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow
from test_images import encoded as picture

from autotag import db
from autotag.errors import TaggingError
from autotag.images import files, urls
from autotag.images.addresses import is_public, public_address
from autotag.images.load import Images

REFUSED = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254",
    "168.63.129.16", "169.254.169.254", "169.254.170.2", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1",
    "192.88.99.1", "192.168.0.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1",
    "255.255.255.255", "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "::8.8.8.8", "::ffff:0:7f00:1",
    "64:ff9b::7f00:1", "64:ff9b::8.8.8.8", "64:ff9b:1::a9fe:a9fe", "100::1", "2001::1", "2001:0:4136:e378::1",
    "2001:2::1", "2001:10::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::", "2002:a9fe:a9fe::1", "2002:808:808::1",
    "3fff::1", "4000::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fd20:ce::254", "fe80::1", "fe80::5efe:10.0.0.1",
    "fec0::1", "ff02::1", "ff0e::1", "2606:4700::5efe:7f00:1", "2606:4700::200:5efe:a9fe:a9fe",
    "2606:4700::100:5efe:808:808", "2606:4700::300:5efe:808:808",
]  # fmt: skip
TAKEN = ["8.8.8.8", "1.1.1.1", "93.184.216.34", "168.63.129.17", "2606:4700::6810:84e5", "2a00:1450:4001:82a::200e",
         "2620:fe::fe", "2001:4860:4860::8888"]  # fmt: skip


@pytest.mark.parametrize("address", REFUSED)
def test_special_addresses_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", TAKEN)
def test_addresses_of_the_internet_are(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


EMBEDDINGS: dict[str, Callable[[int, int], int]] = {
    "mapped": lambda v4, _: 0xFFFF << 32 | v4,
    "translated": lambda v4, _: 0xFFFF << 48 | v4,
    "compatible": lambda v4, _: v4,
    "6to4": lambda v4, rest: 0x2002 << 112 | v4 << 80 | rest & (1 << 80) - 1,
    "Teredo server": lambda v4, rest: 0x20010000 << 96 | v4 << 64 | rest & (1 << 64) - 1,
    "Teredo client": lambda v4, rest: 0x20010000 << 96 | (rest & (1 << 64) - 1) << 32 | v4 ^ 0xFFFFFFFF,
    "NAT64": lambda v4, _: 0x64FF9B << 96 | v4,
    "local NAT64": lambda v4, rest: 0x64FF9B0001 << 80 | (rest & (1 << 48) - 1) << 32 | v4,
    "ISATAP": lambda v4, rest: (rest & (1 << 64) - 1) << 64 | 0x5EFE << 32 | v4,
    "global ISATAP": lambda v4, rest: (rest & (1 << 64) - 1) << 64 | 0x2005EFE << 32 | v4,
}  # fmt: skip
not_global = st.ip_addresses(v=4).filter(lambda address: not address.is_global or address.is_multicast)


@pytest.mark.parametrize("form", EMBEDDINGS)
@given(inner=not_global, rest=st.integers(0, 2**80 - 1))
def test_no_ipv6_that_contains_a_special_ipv4_is_public(form: str, inner: IPv4Address, rest: int) -> None:
    assert not is_public(inner)
    assert not is_public(IPv6Address(EMBEDDINGS[form](int(inner), rest)))


@given(st.ip_addresses())
def test_nothing_that_python_calls_private_is_public(address: IPv4Address | IPv6Address) -> None:
    if not address.is_global or address.is_multicast or address.is_link_local:
        assert not is_public(address)


@pytest.mark.parametrize("address", ["::ffff:8.8.8.8", "fec0::1", "168.63.129.16", "64:ff9b::808:808", "fe80::1%eth0"])
async def test_a_name_that_leads_there_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(*_: object, **__: object) -> list[object]:
        return [(2, 1, 6, "", ("8.8.8.8", 443)), (10, 1, 6, "", (address, 443, 0, 0))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    with pytest.raises(TaggingError) as caught:
        await public_address("images.example.com", 443)
    assert (caught.value.kind, caught.value.code) == ("image", "url_refused")


@pytest.mark.parametrize("name", ["metadata.google.internal", "METADATA.google.internal.", "metadata"])
async def test_names_of_metadata_services_are_not_even_looked_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", None)
    with pytest.raises(TaggingError) as caught:
        await public_address(name, 443)
    assert caught.value.code == "url_refused"


@pytest.mark.parametrize("host", ["a" * 64 + ".example.com", "a..example.com", "a\0b.example.com", "\ud800.example"])
async def test_a_host_that_is_no_name_is_the_images_error(host: str) -> None:
    with pytest.raises(TaggingError) as caught:
        await public_address(host, 443)
    assert (caught.value.kind, caught.value.code) == ("image", "url_refused")


# -- URLs and redirects that cannot be parsed


async def load(url: str, answer: Callable[[httpx.Request], httpx.Response], hosts: frozenset[str]) -> bytes:
    source = Images(supabase_url=None, supabase_key=None, hosts=hosts, max_bytes=100_000, memory=10**9,
                    transport=httpx.MockTransport(answer))  # fmt: skip
    async with source:
        return (await source.load(db.Image(task=1, asset_id="", bucket=None, path=None, url=url), 512)).jpeg


ALLOWED = frozenset({"images.example.com", "xn--.example.com", "a" * 64 + ".example.com", "ex\u00adample.com"})
START = "https://images.example.com/a"
ODD = [
    "https://[", "https://[::1", "https://[v1.x]/", "https://images.example.com:99999/", "https://images.example.com:x/",
    "https://ex\u2100mple.com/", "https://\u2488com/", "https://xn--.example.com/", f"https://{'a' * 64}.example.com/",
    "https://images.example.com/\x00", "https://images.example.com/\ud800", "https://\ud800/", "//[", "https:// /",
    "https://images.example.com/" + "a" * 70_000, "http:///", "https://ex\u00adample.com/",
]  # fmt: skip


def refusing(request: httpx.Request) -> httpx.Response:
    return httpx.Response(404)


@pytest.mark.parametrize("url", ODD, ids=ascii)
async def test_an_odd_url_is_the_images_error(url: str) -> None:
    with pytest.raises(TaggingError) as caught:
        await load(url, refusing, ALLOWED)
    assert caught.value.kind == "image"


@pytest.mark.parametrize("location", ODD, ids=ascii)
async def test_an_odd_redirect_is_the_images_error(location: str) -> None:
    def redirect(request: httpx.Request) -> httpx.Response:
        if request.url.path != "/a":
            return refusing(request)
        raw = location.encode("utf-8", "surrogatepass")
        return httpx.Response(302, headers=[(b"location", raw)])

    with pytest.raises(TaggingError) as caught:
        await load(START, redirect, ALLOWED)
    assert caught.value.kind == "image"


@given(location=st.binary(max_size=60))
async def test_any_redirect_ends_as_a_tagging_error(location: bytes) -> None:
    def redirect(_: httpx.Request) -> httpx.Response:
        return httpx.Response(302, headers=[(b"location", location)])

    with pytest.raises(TaggingError) as caught:
        await load(START, redirect, ALLOWED)
    assert caught.value.kind == "image"


@pytest.mark.parametrize("target", ["https://evil.example.com/", "//evil.example.com", "https://127.0.0.1/",
                                    "https://images.example.com@evil.example.com/", "\\\\evil.example.com"])  # fmt: skip
async def test_a_redirect_to_another_host_is_refused(target: str) -> None:
    asked: list[str] = []

    def redirect(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        return httpx.Response(302, headers={"location": target}) if len(asked) == 1 else httpx.Response(404)

    with pytest.raises(TaggingError):
        await load(START, redirect, frozenset({"images.example.com"}))
    assert set(asked) == {"images.example.com"}


# -- encodings, and what is remembered


class Stream(httpx.AsyncByteStream):
    """A body in chunks, as a connection gives it."""

    def __init__(self, data: bytes, chunk: int = 65_536) -> None:
        self._parts = [data[i : i + chunk] for i in range(0, len(data), chunk)]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            yield part


def encoded(data: bytes, encoding: str) -> Callable[[httpx.Request], httpx.Response]:
    return lambda _: httpx.Response(200, headers={"content-encoding": encoding}, stream=Stream(data))


BOMB = gzip.compress(bytes(50_000_000))


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "GZIP", "x-gzip"])
async def test_what_would_explode_is_refused_and_not_decoded(encoding: str) -> None:
    data = zlib.compress(bytes(50_000_000)) if encoding == "deflate" else BOMB
    tracemalloc.start()
    with pytest.raises(TaggingError) as caught:
        await load(START, encoded(data, encoding), ALLOWED)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (caught.value.kind, caught.value.code) == ("image", "file_too_large")
    assert peak < 5_000_000


@pytest.mark.parametrize(
    ("data", "encoding", "code"),
    [
        (BOMB, "br", "unsupported_format"), (BOMB, "zstd", "unsupported_format"),
        (gzip.compress(BOMB, mtime=0), "gzip, gzip", "unsupported_format"), (gzip.compress(b"a" * 99, mtime=0)[:-9], "gzip", "damaged_image"),
        (b"no gzip", "gzip", "damaged_image"), (b"", "gzip", "damaged_image"), (bytes(100_001), "gzip", "damaged_image"),
    ],
)  # fmt: skip
async def test_other_encodings_are_the_images_error(data: bytes, encoding: str, code: str) -> None:
    with pytest.raises(TaggingError) as caught:
        await load(START, encoded(data, encoding), ALLOWED)
    assert (caught.value.kind, caught.value.code) == ("image", code)


async def test_no_encoding_is_asked_for_and_an_honest_one_is_understood() -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["accept-encoding"])
        body = gzip.compress(picture(Pillow.new("RGB", (20, 20)), "PNG"))
        return httpx.Response(200, headers={"content-encoding": "gzip"}, stream=Stream(body))

    assert (await load(START, answer, ALLOWED)).startswith(b"\xff\xd8")
    assert seen == ["identity"]


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("cut", [1, 100])
async def test_gzip_may_have_several_parts(parts: int, cut: int) -> None:
    """Bytes after the last part are ignored."""
    whole = picture(Pillow.effect_noise((300, 300), 90), "PNG")
    size = -(-len(whole) // parts)
    packed = b"".join(gzip.compress(whole[at : at + size]) for at in range(0, len(whole), size)) + b"\0\0rest"

    class Stream(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for at in range(0, len(packed), cut):
                yield packed[at : at + cut]

    answer = httpx.Response(200, headers={"content-encoding": "gzip"}, stream=Stream())
    assert (await load(START, lambda _: answer, ALLOWED)).startswith(b"\xff\xd8")


class Dripping(httpx.AsyncByteStream):
    """A body that sends a byte now and then, for ever."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0.01)
            yield b"x"


async def test_a_host_that_drips_holds_no_place_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_SECONDS", 0.1)
    with pytest.raises(TaggingError) as caught:
        await load(START, lambda _: httpx.Response(200, stream=Dripping()), ALLOWED)
    assert (caught.value.kind, caught.value.code) == ("transient", "fetch_failed")


async def test_cookies_of_a_host_do_not_come_back() -> None:
    seen: list[bool] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append("cookie" in request.headers)
        return httpx.Response(302, headers={"location": "/b", "set-cookie": "who=me; Path=/"})

    with pytest.raises(TaggingError):
        await load(START, answer, ALLOWED)
    assert seen == [False] * (urls.REDIRECTS + 1)
