"""Icons with bitmaps: the model sees what Chromium shows by the picture's transparency or, without one, by its mask."""

from __future__ import annotations

import io
import struct

import pytest
from PIL import Image as Pillow

from images.judging import judge
from images.odd_files import COLOURS, quarters
from images.test_bmp_fields import HEIGHT, LAYOUTS, LEFT, MASKED, PLAIN, RIGHT_HIDDEN, WIDTH, bmp, sent

NOTHING, RIGHT = 0, (1 << WIDTH - WIDTH // 2) - 1  # what a row of the mask hides


def icon(bitmap: bytes, hidden: int | None = NOTHING) -> bytes:
    """An icon of a BMP. hidden: bits of a row of its mask; None: there is no mask."""
    body = bytearray(bitmap[14:])
    struct.pack_into("<i", body, 8, 2 * HEIGHT)
    if hidden is not None:
        body += (hidden << 64 - WIDTH).to_bytes(8) * HEIGHT
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, WIDTH, HEIGHT, 0, 0, 1, 0, len(body), 22) + bytes(body)


def by_pillow(mode: str) -> bytes:
    out = io.BytesIO()
    quarters(WIDTH, HEIGHT).convert(mode, palette=Pillow.Palette.ADAPTIVE, colors=16).save(out, "BMP")
    return out.getvalue()


BITMAPS = {"palette": by_pillow("P"), "24 bits": by_pillow("RGB")} | {name: bmp(name, 40, MASKED) for name in LAYOUTS}


@pytest.mark.parametrize("name", BITMAPS)
def test_a_mask_hides(name: str) -> None:
    assert not judge(sent(icon(BITMAPS[name])), {"quarters": COLOURS})
    assert not judge(sent(icon(BITMAPS[name], RIGHT)), {"quarters": LEFT})
    assert not judge(sent(icon(BITMAPS[name], None)), {"quarters": COLOURS}), "it is missing"


def test_transparency_counts_more_than_the_mask() -> None:
    for header in (40, 108, 124):
        with_transparency = bmp("A8R8G8B8", header, PLAIN, opacity=RIGHT_HIDDEN)
        assert not judge(sent(icon(with_transparency)), {"quarters": LEFT}), header
        assert not judge(sent(icon(bmp("A8R8G8B8", header, PLAIN), RIGHT)), {"quarters": COLOURS}), header
    leftover = bmp("A8R8G8B8", 40, MASKED, opacity=RIGHT_HIDDEN)
    assert not judge(sent(icon(leftover)), {"quarters": COLOURS}), "the header says nothing about transparency"


def test_transparency_that_a_program_left_empty_leaves_it_to_the_mask() -> None:
    empty = bmp("A8R8G8B8", 40, PLAIN, opacity=(0, 0))
    assert not judge(sent(icon(empty)), {"quarters": COLOURS})
    assert not judge(sent(icon(empty, RIGHT)), {"quarters": LEFT})
