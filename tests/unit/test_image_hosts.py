"""Troubles of other people's image hosts. Each costs only its own images, and only time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from email.utils import formatdate

import httpx
import pytest
from test_images import JPEG

from autotag.errors import TaggingError
from autotag.images import urls
from autotag.images.files import Download, Space
from autotag.images.urls import Urls

A, B = "https://a.example.com/1.jpg", "https://b.example.com/1.jpg"


class Hosts:
    """The answers of hosts, and the requests that they got."""

    def __init__(self, *answers: httpx.Response | Callable[[httpx.Request], httpx.Response]) -> None:
        self.answers = list(answers)
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = self.answers.pop(0) if self.answers else httpx.Response(200, content=JPEG)
        return answer if isinstance(answer, httpx.Response) else answer(request)

    def source(self) -> Urls:
        return Urls(frozenset({"a.example.com", "b.example.com"}), httpx.MockTransport(self))


async def fetched(source: Urls, url: str) -> bytes:
    async with Download(Space(100_000), 100_000) as download:
        file = await source.fetch(url, download)
        return os.pread(file.descriptor, 100_000, 0)


async def trouble(source: Urls, url: str = A) -> TaggingError:
    with pytest.raises(TaggingError) as caught:
        await fetched(source, url)
    return caught.value


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(urls.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("status", "header", "seconds"),
    [
        (429, {"retry-after": "7"}, 7), (503, {"retry-after": "7"}, 7), (429, {}, urls.BUSY_SECONDS),
        (429, {"retry-after": "a date"}, 599), (429, {"retry-after": "soon"}, urls.BUSY_SECONDS),
    ],
)  # fmt: skip
async def test_a_busy_host_waits_and_no_other(
    status: int, header: dict[str, str], seconds: float, clock: list[float]
) -> None:
    if header.get("retry-after") == "a date":  # made now, because tests may wait long for their turn
        header = {"retry-after": formatdate(time.time() + 600, usegmt=True)}
    hosts = Hosts(httpx.Response(status, headers=header))
    async with hosts.source() as source:
        errors = [await trouble(source), await trouble(source, A.replace("1", "2"))]
        assert {(e.kind, e.code, e.origin) for e in errors} == {("rate_limit", "host_busy", "host")}
        assert all(seconds - 1 <= (e.retry_after or 0) <= 2 * seconds + 1 for e in errors)
        assert len({e.retry_after for e in errors}) == 2, "they do not come back at the same time"
        assert "a.example.com" in errors[0].message
        assert len(hosts.asked) == 1, "the second image of the host is not asked for"
        assert await fetched(source, B) == JPEG
        clock[0] += seconds + 1
        assert await fetched(source, A) == JPEG


async def test_a_503_without_a_time_is_an_error_of_the_moment() -> None:
    async with Hosts(httpx.Response(503)).source() as source:
        assert (await trouble(source)).kind == "transient"


async def test_a_host_that_refuses_for_ever_ends_its_images(clock: list[float]) -> None:
    """After an hour without one image, refusals count as failures, so every job ends."""
    hosts = Hosts(*[lambda _: httpx.Response(429, headers={"retry-after": "600"})] * 50)
    async with hosts.source() as source:
        kinds = []
        for _ in range(9):
            kinds.append((await trouble(source)).kind)
            clock[0] += 601
        assert kinds == ["rate_limit"] * 6 + ["transient"] * 3
        clock[0] += 2 * urls.MAX_BUSY_SECONDS
        assert (await trouble(source)).kind == "rate_limit", "that was long ago"
        clock[0] += 601
        hosts.answers = [httpx.Response(404)]
        assert (await trouble(source)).code == "file_missing"
        hosts.answers = [httpx.Response(429)]
        assert (await trouble(source)).kind == "rate_limit", "it has answered since"


@pytest.mark.parametrize("status", urls.REFUSED)
async def test_a_refusal_names_its_host(status: int) -> None:
    page = httpx.Response(status, html="<html><body>Hot-linking is forbidden</body></html>")
    async with Hosts(page).source() as source:
        error = await trouble(source)
    assert (error.kind, error.code) == ("image", "host_refused")
    assert "a.example.com" in error.message
    assert "<" not in error.message


async def test_a_redirect_is_the_next_hosts_business(clock: list[float]) -> None:
    """If a redirect leads to a host that asks to wait, only that host is avoided, not the one in the row."""
    hosts = Hosts(httpx.Response(302, headers={"location": B}), httpx.Response(429, headers={"retry-after": "9"}))
    async with hosts.source() as source:
        assert "b.example.com" in (await trouble(source)).message
        assert await fetched(source, A) == JPEG
        assert (await trouble(source, B)).code == "host_busy"


async def test_five_redirects_are_followed_each_with_the_same_headers() -> None:
    hosts = Hosts(*[httpx.Response(307, headers={"location": f"/{n}"}) for n in range(5)])
    async with hosts.source() as source:
        assert await fetched(source, A) == JPEG
    assert {request.headers["user-agent"] for request in hosts.asked} == {urls.USER_AGENT}
    assert "https://" in urls.USER_AGENT


def by_accept(request: httpx.Request) -> httpx.Response:
    """Answers like an image CDN: with the newest format that the client accepts."""
    accepted = request.headers["accept"]
    chosen = next(kind for kind in ("image/jxl", "image/avif", "image/webp", "image/jpeg") if kind in accepted)
    return httpx.Response(200, content=JPEG, headers={"content-type": chosen})


async def test_no_format_is_asked_for_that_is_dear_or_unreadable() -> None:
    hosts = Hosts(by_accept)
    async with hosts.source() as source:
        await fetched(source, A)
    assert by_accept(hosts.asked[0]).headers["content-type"] == "image/webp"
    assert "*/*" in hosts.asked[0].headers["accept"], "a host that serves application/octet-stream answers, too"
