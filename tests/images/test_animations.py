"""Animations are treated like still pictures: truncated files, colour profiles, and headers that cannot be true."""

from __future__ import annotations

import io
import struct

import pytest
from PIL import Image as Pillow
from PIL import ImageStat

from autotag.errors import TaggingError
from autotag.images.colours import SRGB, by_points
from autotag.images.prepare import prepare_bytes
from images.odd_files import saved

LIMIT = 10**9
GREEN_FIRST = by_points((0.3127, 0.329), [SRGB[1], SRGB[0], SRGB[2]], 2.2)  # its red is green


def animation(kind: str, **options: object) -> bytes:
    frames = [Pillow.effect_noise((200, 150), 40 + n).convert("RGB") for n in range(20)]
    return saved(kind, frames[0], save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "GIF"])
@pytest.mark.parametrize("share", [0.99, 0.5])
def test_a_cut_animation_is_tagged_by_its_first_frames(kind: str, share: float) -> None:
    data = animation(kind)
    assert prepare_bytes(data[: int(len(data) * share)], 512, LIMIT).jpeg == prepare_bytes(data, 512, LIMIT).jpeg


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_an_animation_has_its_colour_profile(kind: str) -> None:
    red, dark = Pillow.new("RGB", (64, 48), (200, 30, 30)), Pillow.new("RGB", (64, 48), (150, 20, 20))
    still = saved(kind, red, icc_profile=GREEN_FIRST, lossless=True)
    moving = saved(kind, red, save_all=True, append_images=[dark], icc_profile=GREEN_FIRST, lossless=True)
    means = [
        ImageStat.Stat(Pillow.open(io.BytesIO(prepare_bytes(data, 512, LIMIT).jpeg))).mean for data in (still, moving)
    ]
    assert means[0][1] > means[0][0], "the profile changes the colours"
    assert max(abs(a - b) for a, b in zip(*means, strict=True)) < 3


@pytest.mark.parametrize("side", [2**32 - 1, 2**31, 50_000_000])
def test_a_size_that_cannot_be_is_damage(side: int) -> None:
    data = bytearray(saved("PNG", Pillow.new("RGB", (8, 8))))
    data[16:20] = struct.pack(">I", side)
    with pytest.raises(TaggingError) as caught:
        prepare_bytes(bytes(data), 512, LIMIT)
    assert caught.value.code == "damaged_image"
