"""No file stalls, grows or ends the worker: images are decoded in processes that can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from autotag.errors import TaggingError
from autotag.images import children, decode
from autotag.images.children import FORK_SERVER, ChildDied, Decoded, TooLarge, read_answer
from autotag.images.decode import Budget, Decoder
from autotag.images.files import Download, ImageFile, Space
from autotag.images.sent import data_url
from lab.image_files import UPRIGHT, encoded, flat_png, quarters, slow_jpeg
from lab.openai_sim.vision import recognise

PHOTO = encoded(quarters(), "JPEG")
SLOW = slow_jpeg(3000, 90)  # about a second
SPACE = Space(10**9, 10**6)


@contextlib.asynccontextmanager
async def file_of(data: bytes) -> AsyncIterator[ImageFile]:
    async with Download(SPACE, 10**9) as download:
        await download.begin(len(data))
        await download.write(data)
        yield download.finish()


async def common(decoder: Decoder, data: bytes, tenant: str = "a") -> Decoded | TooLarge | None:
    async with file_of(data) as file:
        return await decoder.decode(file, 512, tenant)


async def alone(decoder: Decoder, data: bytes, tenant: str, first: TooLarge | None = None) -> Decoded:
    async with decoder.heavy_place(tenant), file_of(data) as file:
        return await decoder.decode_alone(file, 512, tenant, first)


@pytest.fixture
async def decoder() -> AsyncIterator[Decoder]:
    async with Decoder(Budget(2 * 10**9, 1_000_000)) as decoder:
        yield decoder


def is_photo(decoded: Decoded | TooLarge | None) -> bool:
    return isinstance(decoded, Decoded) and recognise(data_url(decoded.jpeg)).tags[:5] == UPRIGHT


def process_of(pid: int, what: str) -> str:
    with open(f"/proc/{pid}/{what}", encoding="utf-8", errors="replace") as file:
        return file.read()


async def test_a_file_that_takes_too_long_fails_after_its_second_child_and_delays_nobody(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "COMMON_CPU", 0.1)
    monkeypatch.setattr(decode, "HEAVY_CPU", 0.2)
    with capture_logs() as logs:
        assert await common(decoder, SLOW, "hostile") is None
        hostile = asyncio.create_task(alone(decoder, SLOW, "hostile"))
        photos = 0
        while not hostile.done():
            assert is_photo(await common(decoder, PHOTO, "quiet"))
            photos += 1
        with pytest.raises(TaggingError) as caught:
            await hostile
    assert (caught.value.kind, caught.value.code) == ("image", "image_too_expensive")
    assert [line["tries"] for line in logs if line["event"] == "image_child_ended"] == [1, 2]
    assert photos >= 5, "others pass it"


async def test_a_file_whose_child_is_killed_is_tried_again(decoder: Decoder) -> None:
    slow = asyncio.create_task(common(decoder, SLOW))
    await asyncio.sleep(0)
    while not (busy := [p for p in child_pids() if children.cpu_seconds(p) > 0.02]):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    os.kill(busy[0], signal.SIGKILL)
    assert await slow is None
    assert len((await alone(decoder, SLOW, "a")).jpeg) > 1000


def child_pids() -> list[int]:
    text = process_of(FORK_SERVER.pid or 0, f"task/{FORK_SERVER.pid}/children")
    return [int(pid) for pid in text.split()]


async def test_a_child_has_no_secret_no_right_and_no_file_of_the_worker(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    await common(decoder, PHOTO)
    [pid] = child_pids()
    assert FORK_SERVER.pid
    for process in (FORK_SERVER.pid, pid):
        assert dict(pair.split("=") for pair in process_of(process, "environ").split("\0")[:-1]) == children.ENVIRONMENT
        status = dict(line.split(":\t", 1) for line in process_of(process, "status").splitlines() if ":\t" in line)
        assert status["NoNewPrivs"] == "1"
        limits = process_of(process, "limits")
        for name in ("Max file size", "Max core file size"):
            [line] = [line for line in limits.splitlines() if line.startswith(name)]
            assert line.split()[-3:-1] == ["0", "0"], line
    assert len(os.listdir(f"/proc/{FORK_SERVER.pid}/task")) == 1, "a fork of a process with threads may hang"
    opened = [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
    assert [name for name in opened if name != "/dev/null" and not name.startswith("socket:")] == []
    assert len([name for name in opened if name.startswith("socket:")]) == 1, "its line to the worker"


async def test_the_children_go_on_without_their_nursery_being_there(decoder: Decoder) -> None:
    await common(decoder, PHOTO)
    assert FORK_SERVER.pid
    os.kill(FORK_SERVER.pid, signal.SIGKILL)
    with contextlib.suppress(TaggingError):
        while await common(decoder, PHOTO) is not None:  # noqa: ASYNC110 (the children end with it)
            await asyncio.sleep(0.01)
    assert is_photo(await common(decoder, PHOTO)), "another fork server, and another child"


async def test_a_large_image_is_decoded_alone_and_what_never_fits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "COMMON_NEED", 44_000_000)
    budget = Budget(10**9, 1_000_000)
    async with Decoder(budget) as decoder:
        large = flat_png(5000, 3000)
        await asyncio.gather(*(common(decoder, PHOTO, tenant) for tenant in "ab"))  # each place has a child
        first = await common(decoder, large)
        assert isinstance(first, TooLarge)
        assert first.need > budget.common
        decoder.check(first)
        running = asyncio.create_task(alone(decoder, large, "a", first))
        other = asyncio.create_task(alone(decoder, large, "b", first))
        assert is_photo(await common(decoder, PHOTO, "c"))
        most = 0
        while not (running.done() and other.done()):
            most = max(most, len(child_pids()))
            await asyncio.sleep(0.005)
        assert most <= decode.CHILDREN
        assert (await running).width == (await other).width == 5000
        with pytest.raises(TaggingError, match="AUTOTAG_MEMORY") as caught:
            decoder.check(TooLarge(50_000, 50_000, budget.heavy + 1))
        assert caught.value.code == "image_too_large"


async def test_a_file_that_never_fits_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only progressive JPEGs need memory for all their pixels, however small they are shown. The message says so."""
    monkeypatch.setattr(decode, "own_memory", lambda: 0)  # that of the tests' process grows
    budget = Budget(512_000_000, 25_000_000)
    small = encoded(quarters(), "JPEG", progressive=True)
    frame = small.index(b"\xff\xc2") + 5  # its height and width
    progressive = small[:frame] + (10_000).to_bytes(2) + (12_000).to_bytes(2) + small[frame + 4 :]
    async with Decoder(budget) as decoder:
        too_large = await common(decoder, progressive)
        assert isinstance(too_large, TooLarge)
        with pytest.raises(TaggingError) as caught:
            decoder.check(too_large)
    said = caught.value.message
    assert "12000 × 10000 pixels" in said
    assert "Save it as a JPEG that is not progressive, or raise AUTOTAG_MEMORY by " in said
    more = int(re.findall(r"by ([\d,]+) MB", said)[0].replace(",", "")) * 1_000_000
    Decoder(Budget(512_000_000 + more + 2_000_000, 25_000_000)).check(too_large)  # that is enough


async def test_a_child_that_uses_more_memory_than_its_image_costs_is_killed(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's headers are wrong, or a decoder has a bug. Either the system refuses the memory, or the worker
    notices."""
    monkeypatch.setattr(children, "DATA_MARGIN", 0)
    monkeypatch.setattr(decode, "COMMON_NEED", 0)
    with capture_logs() as logs:
        child = await children.Child.start(1_000_000)
        child.max_need = 10**9  # what the worker asks for is more than the process may use
        async with file_of(flat_png(6000, 4000)) as file:
            with pytest.raises(ChildDied):
                await child.decode(file, 512, 10**9, cpu=10, wall=60)
        await child.close()
    assert logs == []


ABOUT: dict[str, Any] = {"width": 3, "height": 2, "need": 1}


@pytest.mark.parametrize(
    ("answer", "image"),
    [
        ({}, b""), (ABOUT | {"notes": {}}, b"no JPEG"), (ABOUT | {"notes": []}, b"\xff\xd8\xff"),
        (ABOUT | {"notes": {"a": "x" * 2000}}, b"\xff\xd8\xff"), (ABOUT | {"width": None, "notes": {}}, b"\xff\xd8\xff"),
        ({"code": "a code with blanks", "message": ""}, b""), ({"code": "x" * 200, "message": ""}, b""),
        ({"code": "no_message"}, b""),
    ],
)  # fmt: skip
def test_what_a_child_answers_is_checked(answer: dict[str, Any], image: bytes) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        read_answer(json.loads(json.dumps(answer)), image)


def test_a_childs_sentence_is_short_and_printable() -> None:
    with pytest.raises(TaggingError) as caught:
        read_answer({"code": "damaged_image", "message": "a\x00\x1b[31m" + "b" * 9999}, b"")
    assert caught.value.kind == "image"
    assert len(caught.value.message) <= children.MAX_MESSAGE
    assert caught.value.message.isprintable()


async def test_files_wait_for_their_bytes_and_none_is_lost() -> None:
    space = Space(100)
    running = most = 0

    async def read(size: int) -> None:
        nonlocal running, most
        async with Download(space, 100, f"{size % 3}") as download:
            await download.begin(size)
            running += size
            most = max(most, running)
            await download.write(b"x" * size)
            await asyncio.sleep(0)
            download.finish()
            running -= size

    tasks = [asyncio.create_task(read(size)) for size in (60, 60, 30, 100, 10, 40, 60) * 5]
    await asyncio.sleep(0)
    for task in tasks[1::3]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most <= 100
    async with asyncio.timeout(10):
        await space.take(100, "")
