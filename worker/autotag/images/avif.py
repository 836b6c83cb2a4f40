"""AVIF files. Pillow decodes them, but does not crop or rotate them, and ignores colours except for an ICC profile."""

from __future__ import annotations

import io
from functools import partial

from PIL import AvifImagePlugin

from autotag.images import exif
from autotag.images.boxes import primary_properties
from autotag.images.colours import by_numbers
from autotag.images.frames import open_frames
from autotag.images.opened import Decoded, Opened

Box = tuple[int, int, int, int]


def open_avif(data: bytes, side: int) -> Opened:
    """Opens an AVIF: the primary picture, or the frames of a sequence."""
    opened = open_frames("AVIF", data, side, AvifImagePlugin.AvifImageFile)
    with AvifImagePlugin.AvifImageFile(io.BytesIO(data)) as image:
        # Pillow stores the file's rotation and mirroring (irot, imir) there, instead of EXIF's own.
        orientation = exif.orientation(image.info.get("exif", b""))
    properties = dict(primary_properties(data))
    crop = _crop(properties.get(b"clap", b""), opened.width, opened.height)
    colours = properties.get(b"colr", b"")
    icc = by_numbers(*(int.from_bytes(colours[at : at + 2]) for at in (4, 6))) if colours[:4] == b"nclx" else None
    width, height = (crop[2] - crop[0], crop[3] - crop[1]) if crop else (opened.width, opened.height)
    return Opened(
        "AVIF", width, height, opened.need, partial(_decode, opened, crop, icc), orientation, held=opened.held
    )


def _decode(opened: Opened, crop: Box | None, icc: bytes | None, width: int, height: int) -> Decoded:
    if crop is None:
        decoded = opened.decode(width, height)
    else:
        across, down = crop[2] - crop[0], crop[3] - crop[1]
        decoded = opened.decode(-(-width * opened.width // across), -(-height * opened.height // down))
        x, y = decoded.image.width / opened.width, decoded.image.height / opened.height
        box = (round(crop[0] * x), round(crop[1] * y), round(crop[2] * x), round(crop[3] * y))
        decoded = Decoded(decoded.image.crop(box), decoded.icc, decoded.notes)
    return Decoded(decoded.image, decoded.icc or icc, decoded.notes)


def _crop(clap: bytes, width: int, height: int) -> Box | None:
    """The part that is shown (ISO/IEC 14496-12, 12.1.4): its size, and the offset of its centre from the picture's."""
    parts = [int.from_bytes(clap[at : at + 4], signed=True) for at in range(0, 32, 4)]
    if len(clap) < 32 or any(below <= 0 for below in parts[1::2]):
        return None
    across, down, right, lower = (above / below for above, below in zip(parts[::2], parts[1::2], strict=True))
    left, top = round((width - across) / 2 + right), round((height - down) / 2 + lower)
    box = (left, top, round(left + across), round(top + down))
    return box if 0 <= left < box[2] <= width and 0 <= top < box[3] <= height else None
