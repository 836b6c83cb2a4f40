"""Every uploaded file becomes the small upright JPEG that the model sees, or fails with a sentence."""

from __future__ import annotations

import asyncio
import io
import struct
import zlib

import httpx
import pillow_heif
import pytest
from PIL import Image as Pillow

from autotag import db
from autotag.errors import TaggingError
from autotag.images import jpeg
from autotag.images import prepare as images
from autotag.images.load import Images
from autotag.images.sent import data_url
from lab.image_files import UPRIGHT, encoded, quarters
from lab.openai_sim.vision import recognise

PIXELS = 100_000_000
MEMORY = 300_000_000  # bytes


def seen(data: bytes, side: int = 512) -> tuple[str, ...]:
    """The picture that the simulator sees. Its size is checked."""
    jpeg = images.prepare_bytes(data, side, MEMORY).jpeg
    with Pillow.open(io.BytesIO(jpeg)) as image:
        assert image.format == "JPEG"
        assert max(image.size) <= side
        assert not image.getexif()
    return recognise(data_url(jpeg)).tags


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIF"])
def test_every_format_becomes_a_small_jpeg(kind: str) -> None:
    if kind == "HEIF":
        out = io.BytesIO()
        pillow_heif.from_pillow(quarters()).save(out, quality=90)
        data = out.getvalue()
    else:
        data = encoded(quarters(), kind)
    assert seen(data)[:5] == UPRIGHT


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_every_colour_mode(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert seen(encoded(quarters().convert(mode), kind))[:5] == UPRIGHT


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_gray_images(mode: str) -> None:
    gray = quarters().convert("L")
    if mode == "I;16":
        image = Pillow.new("I;16", gray.size)
        image.putdata([value * 257 for value in gray.get_flattened_data()])
    else:
        image = gray.convert(mode)
    assert "landscape" in seen(encoded(image, "PNG"))


def test_transparency_is_shown_on_white() -> None:
    assert seen(encoded(Pillow.new("RGBA", (300, 300), (0, 0, 0, 0)), "PNG"))[0] == "top left white"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(orientation: int) -> None:
    undo = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}.get(orientation, [])
    image = quarters()
    for operation in undo:
        image = image.transpose(Pillow.Transpose(operation))
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    assert seen(encoded(image, "JPEG", exif=exif))[:5] == UPRIGHT


def test_metadata_does_not_leave_the_project() -> None:
    exif = Pillow.Exif()
    exif[0x010F] = "SecretCamera"
    data = encoded(quarters(), "JPEG", exif=exif, comment=b"SecretComment")
    assert b"Secret" in data
    assert b"Secret" not in images.prepare_bytes(data, 512, MEMORY).jpeg


def test_a_bomb_is_refused_with_its_size() -> None:
    with pytest.raises(TaggingError) as caught:
        images.prepare_bytes(png_of(2_000_000, 50_000), 512, MEMORY)
    assert caught.value.code == "image_too_large"
    assert "2000000 × 50000 pixels" in caught.value.message


def test_an_animation_counts_by_its_first_frame() -> None:
    second = Pillow.new("RGB", (800, 600), "black")
    data = encoded(quarters(), "GIF", save_all=True, append_images=[second], duration=100)
    assert seen(data)[:4] == UPRIGHT[:4]


def test_a_small_image_is_not_blown_up() -> None:
    with Pillow.open(
        io.BytesIO(images.prepare_bytes(encoded(quarters(size=(40, 30)), "PNG"), 512, MEMORY).jpeg)
    ) as image:
        assert image.size == (40, 30)


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header claims this size, with hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


JPEG = encoded(quarters(), "JPEG")


@pytest.mark.parametrize(
    ("data", "code", "sentence"),
    [
        (b"", "empty_file", "The file is empty."),
        (b"hello, world\n" * 50, "unsupported_format", "This is a text, not an image. Upload a PNG or JPEG instead."),
        (b"%PDF-1.7\n" + b"x" * 500, "damaged_image", "The image file is damaged or incomplete."),
        (b"PK\x03\x04" + b"x" * 500, "unsupported_format", "This is an archive (ZIP). Upload a PNG or JPEG instead."),
        (b"\0" * 5000, "not_an_image", "The file is not an image."),
        (JPEG[:50], "damaged_image", "The image file is damaged or incomplete."),
        (JPEG[: len(JPEG) // 2], "damaged_image", "The image file is damaged or incomplete."),
        (encoded(quarters(), "PNG")[:200], "damaged_image", "The image file is damaged or incomplete."),
        (encoded(quarters(), "WEBP")[:100], "damaged_image", "The image file is damaged or incomplete."),
        (encoded(quarters(), "AVIF")[:200], "damaged_image", "The image file is damaged or incomplete."),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'><path", "damaged_image",
         "The image file is damaged or incomplete."),
        (png_of(300, 300), "damaged_image", "The image file is damaged or incomplete."),
    ],
    ids=["empty", "text", "pdf", "zip", "zeros", "jpeg head", "half jpeg", "png head", "webp head", "avif head", "svg",
         "png without pixels"],
)  # fmt: skip
def test_what_is_no_good_fails_with_a_code_and_a_sentence(data: bytes, code: str, sentence: str) -> None:
    with pytest.raises(TaggingError) as caught:
        images.prepare_bytes(data, 512, MEMORY)
    assert (caught.value.kind, caught.value.code, caught.value.message) == ("image", code, sentence)


# -- where images come from


def loader(handler: httpx.MockTransport | None = None, **changes: object) -> Images:
    settings = {
        "supabase_url": None, "supabase_key": None, "hosts": frozenset({"images.example.com"}),
        "max_bytes": 100_000, "memory": 10**9, "transport": handler, **changes,
    }  # fmt: skip
    return Images(**settings)  # type: ignore[arg-type]


async def load(url: str, handler: httpx.MockTransport | None = None, **changes: object) -> bytes:
    async with loader(handler, **changes) as source:
        return (await source.load(db.Image(task=1, asset_id="", bucket=None, path=None, url=url), 512)).jpeg


def answering(*responses: httpx.Response) -> httpx.MockTransport:
    left = list(responses)
    return httpx.MockTransport(lambda _: left.pop(0))


async def test_an_allowed_url_is_fetched() -> None:
    jpeg = await load("https://images.example.com/a.jpg", answering(httpx.Response(200, content=JPEG)))
    assert recognise(data_url(jpeg)).tags[:5] == UPRIGHT


@pytest.mark.parametrize(
    "url",
    [
        "http://images.example.com/a.jpg", "ftp://images.example.com/a.jpg", "https://evil.example.com/a.jpg",
        "https://images.example.com:8443/a.jpg", "https://user:pass@images.example.com/a.jpg", "file:///etc/passwd",
        "https://images.example.com.evil.com/a.jpg", "https://[::1]/a.jpg", "https://[broken/a.jpg", "", "javascript:1",
    ],
)  # fmt: skip
async def test_other_urls_are_refused_without_a_request(url: str) -> None:
    with pytest.raises(TaggingError) as caught:
        await load(url, answering())
    assert (caught.value.kind, caught.value.code) == ("image", "url_refused")


@pytest.mark.parametrize("target", ["http://images.example.com/b", "https://169.254.169.254/latest", "//localhost/x"])
async def test_a_redirect_is_checked_again(target: str) -> None:
    redirect = httpx.Response(302, headers={"location": target})
    with pytest.raises(TaggingError) as caught:
        await load("https://images.example.com/a", answering(redirect))
    assert caught.value.code == "url_refused"


async def test_redirects_are_followed_but_not_for_ever() -> None:
    hop = {"location": "https://images.example.com/next"}
    assert await load(
        "https://images.example.com/a", answering(httpx.Response(301, headers=hop), httpx.Response(200, content=JPEG))
    )
    with pytest.raises(TaggingError) as caught:
        await load("https://images.example.com/a", answering(*[httpx.Response(302, headers=hop)] * 9))
    assert (caught.value.kind, caught.value.code) == ("image", "fetch_failed")


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "::1",
     "fe80::1", "fc00::1", "::ffff:127.0.0.1", "224.0.0.1"],
)  # fmt: skip
async def test_a_name_that_leads_into_a_private_network_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolve(*_: object, **__: object) -> list[object]:
        return [(2, 1, 6, "", ("93.184.216.34", 443)), (2, 1, 6, "", (address, 443))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    with pytest.raises(TaggingError) as caught:
        await load("https://images.example.com/a.jpg")
    assert caught.value.code == "url_refused"


@pytest.mark.parametrize(
    ("response", "kind", "code"),
    [
        (httpx.Response(404), "image", "file_missing"), (httpx.Response(403), "image", "host_refused"),
        (httpx.Response(500), "transient", "fetch_failed"), (httpx.Response(429), "rate_limit", "host_busy"),
        (httpx.Response(200, content=b"x" * 100_001), "image", "file_too_large"),
        (httpx.Response(200, content=b""), "image", "empty_file"),
    ],
)  # fmt: skip
async def test_answers_of_the_images_host(response: httpx.Response, kind: str, code: str) -> None:
    with pytest.raises(TaggingError) as caught:
        await load("https://images.example.com/a.jpg", answering(response))
    assert (caught.value.kind, caught.value.code) == (kind, code)


async def test_a_broken_connection_is_of_the_moment() -> None:
    def fail(_: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("slow")

    with pytest.raises(TaggingError) as caught:
        await load("https://images.example.com/a.jpg", httpx.MockTransport(fail))
    assert caught.value.kind == "transient"


async def test_storage_without_keys_is_the_accounts_trouble() -> None:
    async with loader() as source:
        with pytest.raises(TaggingError) as caught:
            await source.load(db.Image(task=1, asset_id="", bucket="assets", path="a/b.jpg", url=None), 512)
    assert caught.value.kind == "account"
    assert "SUPABASE_URL" in caught.value.message


@pytest.mark.parametrize("path", ["../secret/a.jpg", "a/../../b.jpg", "/a.jpg", "a//b.jpg", "./a.jpg"])
async def test_a_path_cannot_leave_its_bucket(path: str) -> None:
    async with loader(supabase_url="http://127.0.0.1:1", supabase_key="k") as source:
        with pytest.raises(TaggingError) as caught:
            await source.load(db.Image(task=1, asset_id="", bucket="assets", path=path, url=None), 512)
    assert caught.value.code == "file_missing"


def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each scan is a hundred bytes and goes over all pixels, and a decoding thread cannot be stopped."""
    progressive = encoded(quarters(), "JPEG", progressive=True)
    assert images.prepare_bytes(progressive + b"\xff\xda\x00\x02" * 500, 512, MEMORY), (
        "what follows its end does not count"
    )
    monkeypatch.setattr(jpeg, "MAX_SCANS", 5)
    with pytest.raises(TaggingError) as caught:
        images.prepare_bytes(progressive, 512, MEMORY)
    assert caught.value.code == "unsupported_format"
    assert images.prepare_bytes(encoded(quarters(), "JPEG"), 512, MEMORY)
