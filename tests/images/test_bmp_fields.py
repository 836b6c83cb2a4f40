"""BMPs with pixels of 16 or 32 bits, in which any bits are a colour: the model sees the same as in Chromium."""

from __future__ import annotations

import struct

import pytest

from autotag.errors import TaggingError
from autotag.images.prepare import prepare_bytes
from images.judging import judge
from images.odd_files import COLOURS, quarters

WIDTH, HEIGHT = 49, 40  # a row of 16-bit numbers needs padding
PLAIN, MASKED, MASKED_WITH_ALPHA = 0, 3, 6  # how the header says that pixels are stored
HEADERS = (40, 52, 56, 108, 124)
#: Bits, and the masks of red, green, blue and transparency.
LAYOUTS = {
    "X1R5G5B5": (16, (0x7C00, 0x3E0, 0x1F, 0)), "A1R5G5B5": (16, (0x7C00, 0x3E0, 0x1F, 0x8000)),
    "R5G6B5": (16, (0xF800, 0x7E0, 0x1F, 0)), "B5G6R5": (16, (0x1F, 0x7E0, 0xF800, 0)),
    "A4R4G4B4": (16, (0xF00, 0xF0, 0xF, 0xF000)), "X4R4G4B4": (16, (0xF00, 0xF0, 0xF, 0)),
    "R4G4B4A4": (16, (0xF000, 0xF00, 0xF0, 0xF)), "R5G5B5A1": (16, (0xF800, 0x7C0, 0x3E, 1)),
    "A8R8G8B8": (32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)), "X8R8G8B8": (32, (0xFF0000, 0xFF00, 0xFF, 0)),
    "A8B8G8R8": (32, (0xFF, 0xFF00, 0xFF0000, 0xFF000000)), "R8G8B8A8": (32, (0xFF000000, 0xFF0000, 0xFF00, 0xFF)),
    "B8G8R8A8": (32, (0xFF00, 0xFF0000, 0xFF000000, 0xFF)), "R5G6B5 in 32": (32, (0xF800, 0x7E0, 0x1F, 0)),
    "A2R10G10B10": (32, (0x3FF00000, 0xFFC00, 0x3FF, 0xC0000000)),
}  # fmt: skip
RIGHT_HIDDEN = (255, 0)
LEFT = (COLOURS[0], (255, 255, 255), COLOURS[2], (255, 255, 255))  # the quarters, if those on the right are hidden


def field(value: int, mask: int) -> int:
    """A value from 0 to 255 in the bits of a mask."""
    shift = (mask & -mask).bit_length() - 1 if mask else 0
    return round(value * (mask >> shift) / 255) << shift


def bmp(
    layout: str,
    header: int = 124,
    stored: int = MASKED,
    *,
    opacity: tuple[int, int] = (255, 255),
    downwards: bool = False,
) -> bytes:
    """A BMP of the quarters. opacity: of the quarters on the left and right."""
    bits, masks = LAYOUTS[layout]
    pixels = quarters(WIDTH, HEIGHT).load()
    assert pixels
    rows = b""
    for y in range(HEIGHT) if downwards else reversed(range(HEIGHT)):
        values = ((*pixels[x, y], opacity[x >= WIDTH // 2]) for x in range(WIDTH))  # type: ignore[misc]
        row = b"".join(sum(map(field, value, masks)).to_bytes(bits // 8, "little") for value in values)
        rows += row.ljust(-(-len(row) // 4) * 4, b"\0")
    height = -HEIGHT if downwards else HEIGHT
    head = struct.pack("<IiiHHIIiiII", header, WIDTH, height, 1, bits, stored, len(rows), 2835, 2835, 0, 0)
    after = struct.pack("<4I", *masks)[: {MASKED: 12, MASKED_WITH_ALPHA: 16}.get(stored, 0) if header == 40 else 16]
    head += after if header == 40 else after.ljust(header - 40, b"\0")[: header - 40]
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(rows), 0, 0, 14 + len(head)) + head + rows


def sent(data: bytes) -> bytes:
    return prepare_bytes(data, 512, 300_000_000).jpeg


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_bits_are_colours(layout: str) -> None:
    for header in HEADERS:
        assert not judge(sent(bmp(layout, header)), {"quarters": COLOURS}), header
    assert not judge(sent(bmp(layout, downwards=True)), {"quarters": COLOURS})
    assert not judge(sent(bmp(layout, 40, MASKED_WITH_ALPHA)), {"quarters": COLOURS})


@pytest.mark.parametrize("layout", [name for name, (_, masks) in LAYOUTS.items() if masks[3]])
def test_bits_are_transparency_if_the_header_says_so(layout: str) -> None:
    for header, stored in ((56, MASKED), (108, MASKED), (124, MASKED), (40, MASKED_WITH_ALPHA)):
        assert not judge(sent(bmp(layout, header, stored, opacity=RIGHT_HIDDEN)), {"quarters": LEFT}), header
    for header in (40, 52):
        assert not judge(sent(bmp(layout, header, opacity=RIGHT_HIDDEN)), {"quarters": COLOURS}), (
            "the bits are left over"
        )


def test_plain_pixels_have_the_usual_bits() -> None:
    assert not judge(sent(bmp("A8R8G8B8", 124, PLAIN, opacity=RIGHT_HIDDEN)), {"quarters": LEFT})
    for layout, header in (("A8R8G8B8", 40), ("A1R5G5B5", 40), ("A1R5G5B5", 124)):
        assert not judge(sent(bmp(layout, header, PLAIN, opacity=RIGHT_HIDDEN)), {"quarters": COLOURS}), layout


def test_transparency_that_a_program_left_empty_hides_nothing() -> None:
    """Some programs leave all transparency at zero. Chromium then shows nothing, other programs show the picture."""
    assert not judge(sent(bmp("A8R8G8B8", opacity=(0, 0))), {"quarters": COLOURS})


@pytest.mark.parametrize("downwards", [False, True])
def test_a_few_rows_may_be_missing(downwards: bool) -> None:
    data = bmp("A4R4G4B4", downwards=downwards)
    prepared = prepare_bytes(data[: int(len(data) * 0.98)], 512, 300_000_000)
    assert prepared.notes["truncated"] > 0.95
    assert not judge(prepared.jpeg, {"quarters": COLOURS})
    with pytest.raises(TaggingError, match="damaged"):
        sent(data[: len(data) // 2])
