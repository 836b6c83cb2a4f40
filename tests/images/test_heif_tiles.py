"""HEIC pictures that consist of tiles, as cameras save them: decoded tile by tile, they look the same as in one
piece."""

from __future__ import annotations

import io

import pillow_heif
import pytest
from PIL import Image as Pillow
from PIL import ImageChops

from autotag.errors import TaggingError
from autotag.images import heif, heif_tiles
from autotag.images.finish import TURNS
from autotag.images.opened import Decoded, Opened
from autotag.images.prepare import prepare_bytes
from images.judging import judge
from images.odd_files import COLOURS, quarters

SIDE = 64


@pytest.fixture(scope="module")
def tiled() -> bytes:
    """An upright picture of 3 × 2 tiles, whose file has a place for a turn."""
    exif = Pillow.Exif()
    exif[0x0112] = 3
    out = io.BytesIO()
    image = pillow_heif.from_pillow(quarters(300, 200))
    image.save(out, quality=80, tile_size=128, exif=exif.tobytes())
    return out.getvalue()


def changed(data: bytes, kind: bytes, value: int) -> bytes:
    at = data.index(b"irot")
    return data[:at] + kind + bytes([value]) + data[at + 5 :]


@pytest.mark.parametrize(("kind", "value"), [*((b"irot", n) for n in range(4)), (b"imir", 0), (b"imir", 1)])
def test_tiles_are_put_together_and_turned_as_libheif_does(tiled: bytes, kind: bytes, value: int) -> None:
    data = changed(tiled, kind, value)
    opened = heif.open_heif(data, SIDE)
    upright = pillow_heif.open_heif(data).to_pillow()
    tiles = heif_tiles.grid(data)
    assert tiles, "pillow-heif's libheif decodes tiles"
    assert opened.orientation == tiles.orientation
    found = heif_tiles.decode(data, tiles, 1)
    if tiles.orientation in TURNS:
        found = found.transpose(TURNS[tiles.orientation])
    assert found.size == upright.size
    assert not ImageChops.difference(found, upright.convert("RGB")).getbbox()


def test_a_tiled_picture_is_sent_upright(tiled: bytes) -> None:
    data = changed(tiled, b"irot", 2)
    expected = {"quarters": COLOURS[::-1]}
    assert not judge(prepare_bytes(data, SIDE, 200_000_000).jpeg, expected)


def test_tiles_take_a_part_of_the_memory(tiled: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A phone's picture of 24 megapixels fits into the memory of an ordinary image."""
    grid = heif_tiles.Grid(12, 8, 512, 512, 6048, 4032, 6)
    monkeypatch.setattr(heif_tiles, "grid", lambda _: grid)
    by_tiles = heif.open_heif(tiled, 512)
    assert (by_tiles.width, by_tiles.height, by_tiles.orientation) == (6048, 4032, 6)
    assert by_tiles.need < 60_000_000


def test_without_that_library_it_is_decoded_at_once(tiled: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heif_tiles, "_library", lambda: None)
    opened = heif.open_heif(tiled, SIDE)
    assert isinstance(opened, Opened)
    assert isinstance(opened.decode(96, 64), Decoded)


def test_a_missing_tile_is_damage(tiled: bytes) -> None:
    with pytest.raises(TaggingError) as caught:
        prepare_bytes(tiled[: len(tiled) - 400], SIDE, 200_000_000)
    assert caught.value.code == "damaged_image"
