"""Converts a decoded picture to what the model sees: a JPEG of the right size, upright, in sRGB, on a background."""

from __future__ import annotations

import io
from functools import cache

from PIL import Image as Pillow
from PIL import ImageChops, ImageCms, ImageFilter

from autotag.images.opened import Decoded
from autotag.images.shape import Shape, layout

#: A 512 px image has 30–60 KB with this quality, and 15 % more with 90.
JPEG_QUALITY = 85
#: The filter for scaling down. Together with `SHARPER`, letters are as readable as after Lanczos, in half the time.
SCALING = Pillow.Resampling.HAMMING
#: Sharpens a picture that was scaled down, because scaling and JPEG blur small text and thin lines. A reader of letters
#: of 3 to 7 pixels recognises 0.5 % more than in a lossless Lanczos picture, and without sharpening 0.8 % less
#: (tests/images/test_small_text.py). Sharpening takes as long as scaling.
SHARPER = ImageFilter.Kernel((3, 3), (0, -0.15, 0, -0.15, 1.6, -0.15, 0, -0.15, 0), scale=1)
#: Backgrounds for transparency, the usual one first: shades of grey.
BACKGROUNDS = (255, 0, 128, 192, 64)
#: The share of the visible pixels that must differ from the background.
SEEN_SHARE = 0.02
CLEARLY = 96  # a difference of grey that everybody sees
MAX_ICC = 4_000_000  # bytes
#: Colours that show whether a profile changes anything, and the largest difference that nobody sees.
PROBE = [(20, 20, 20), (64, 64, 64), (160, 160, 160), (220, 30, 30), (30, 160, 50), (30, 50, 210), (235, 220, 40)]
MAX_SAME = 4
#: How to turn a picture by its EXIF orientation.
TURNS = {
    2: Pillow.Transpose.FLIP_LEFT_RIGHT, 3: Pillow.Transpose.ROTATE_180, 4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE, 6: Pillow.Transpose.ROTATE_270, 7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_90,
}  # fmt: skip


def encode(decoded: Decoded, orientation: int, shape: Shape, *, smaller: bool) -> bytes:
    """The JPEG that is sent.

    Args:
        decoded: the picture.
        orientation: how to turn it, as in EXIF.
        shape: the size of the upright picture, and into how many pieces it is cut.
        smaller: whether the picture was scaled down.
    """
    size = (shape.width, shape.height) if orientation < 5 else (shape.height, shape.width)
    image = scaled(decoded.image, size)
    image = to_srgb(image, decoded.icc)
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    image = flattened(image)
    if smaller:
        image = image.filter(SHARPER)
    if shape.pieces > 1:
        image = side_by_side(image, shape)
    image.info.clear()  # otherwise comments and other metadata are saved again
    out = io.BytesIO()
    image.save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


def plain(image: Pillow.Image) -> Pillow.Image:
    """The picture without a palette or single bits: scaling would drop thin lines or mix up the palette's numbers."""
    transparent = image.has_transparency_data
    if image.mode in ("RGB", "CMYK", "L", "LAB") and not transparent:
        return image
    if image.mode in ("1", "L", "LA", "La"):
        return image.convert("LA" if transparent else "L")
    if image.mode == "CMYK":
        return image
    return image.convert("RGBA" if transparent else "RGB")


def scaled(image: Pillow.Image, size: tuple[int, int]) -> Pillow.Image:
    """The picture in this size, without a palette."""
    image = plain(image)
    if image.size == size:
        return image
    return image.resize(size, SCALING, reducing_gap=3.0)


def to_srgb(image: Pillow.Image, icc: bytes | None) -> Pillow.Image:
    """The picture in sRGB: L, LA, RGB or RGBA. An invalid profile is ignored, as in browsers."""
    if image.mode == "LAB":
        return ImageCms.profileToProfile(image, _lab(), _srgb(), outputMode="RGB") or image
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colours = image.convert({"LA": "L", "RGBA": "RGB"}.get(image.mode, image.mode)) if alpha else image
    converted = _by_profile(colours, icc) if icc and len(icc) <= MAX_ICC else None
    if converted is None:
        return image.convert("RGB") if image.mode == "CMYK" else image
    if alpha:
        converted.putalpha(alpha)
    return converted


def _by_profile(image: Pillow.Image, icc: bytes) -> Pillow.Image | None:
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        space = profile.profile.xcolor_space.strip()
        if {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space) != image.mode:
            return None
        transform = ImageCms.buildTransform(profile, _srgb(), image.mode, "RGB")
        if image.mode == "RGB" and _is_same(transform):
            return None
        return ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError):
        return None


def _is_same(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a profile is sRGB. Its name does not show that: "Linear sRGB" is a different profile."""
    probe = Pillow.new("RGB", (len(PROBE), 1))
    probe.putdata(PROBE)
    changed = ImageChops.difference(probe, ImageCms.applyTransform(probe, transform) or probe)
    return max(changed.tobytes()) <= MAX_SAME


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@cache
def _lab() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))


def flattened(image: Pillow.Image) -> Pillow.Image:
    """The picture without transparency, on a background that differs from everything visible."""
    if image.mode not in ("LA", "RGBA"):
        return image.convert("RGB")
    alpha = image.getchannel("A")
    background = Pillow.new("RGB", image.size, (_background(image, alpha),) * 3)
    background.paste(image.convert("RGB"), mask=alpha)
    return background


def _background(image: Pillow.Image, alpha: Pillow.Image) -> int:
    """The shade that differs most from the visible shades; white if it is as good, or if nothing is visible."""
    visible = alpha.point([255 if value >= 128 else 0 for value in range(256)])
    if visible.getextrema() == (0, 0):  # only a hint of something
        visible = alpha
    counts = image.convert("RGB").convert("L").histogram(visible)
    groups = [(sum(counts[at : at + 16]), at + 8) for at in range(0, 256, 16)]
    enough = SEEN_SHARE * sum(counts)
    shades = [shade for count, shade in groups if count and count >= enough]
    if not shades:
        return BACKGROUNDS[0]
    return max(BACKGROUNDS, key=lambda background: min(CLEARLY, *(abs(background - shade) for shade in shades)) // 16)


def side_by_side(image: Pillow.Image, shape: Shape) -> Pillow.Image:
    """A long strip as pieces: the columns (or rows) of one picture, with gaps between them."""
    width, height, step = layout(shape)
    sheet = Pillow.new("RGB", (width, height), (128, 128, 128))
    for piece in range(shape.pieces):
        if shape.height > shape.width:
            part = image.crop((0, piece * height, image.width, (piece + 1) * height))
            sheet.paste(part, (piece * step, 0))
        else:
            part = image.crop((piece * width, 0, (piece + 1) * width, image.height))
            sheet.paste(part, (0, piece * step))
    return sheet
