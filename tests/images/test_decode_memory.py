"""The memory need of a file is known before it is decoded: a child never grows by more than `Opened.need`."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pillow_heif
import pytest
from PIL import Image as Pillow

from autotag.images import decode
from images.odd_files import adam7, quarters, saved

LIMIT = 300_000_000
#: Of the longer side: as ``image_detail`` low and high have it, and the most of ``image_side``.
SIDES = (512, 2048, 2500)
CHILD = """
import json, re, sys
from pathlib import Path
from autotag.images.prepare import measure, prepare
from autotag.errors import TaggingError
path, limit = Path(sys.argv[1]), int(sys.argv[2])
def peak():  # not ru_maxrss, which has the peak of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
import io
from PIL import Image
from autotag.images.prepare import prepare_bytes
out = io.BytesIO()
Image.new("RGB", (90, 90)).save(out, "PNG")
prepare_bytes(out.getvalue(), 64, limit)  # as the process has imported what it needs
idle = peak()
for side in sys.argv[3:]:
    measured = measure(path, int(side))
    try:
        prepare(path, int(side), limit)
        code = None
    except TaggingError as error:
        code = error.code
    print(json.dumps({"side": side, "need": measured.need, "grown": peak() - idle, "code": code}))
"""


def drawn(width: int, height: int) -> Pillow.Image:
    return quarters(width, height)


def heic(width: int, height: int, **options: int) -> bytes:
    out = io.BytesIO()
    pillow_heif.from_pillow(drawn(width, height)).save(out, quality=40, **options)
    return out.getvalue()


def frames(kind: str, **options: int) -> bytes:
    """Two frames, the first of which is blank."""
    blank = Pillow.new("RGBA", (1800, 1800))
    return saved(kind, blank, save_all=True, append_images=[drawn(1800, 1800).convert("RGBA")], **options)


FILES: dict[str, Callable[[], bytes]] = {
    "JPEG of 200 megapixels": lambda: saved("JPEG", Pillow.new("L", (16_000, 12_500), 99), quality=60),
    "progressive JPEG": lambda: saved("JPEG", drawn(3000, 2600), progressive=True),
    "PNG of 100 megapixels": lambda: saved("PNG", Pillow.new("L", (10_000, 10_000), 99), compress_level=1),
    "PNG with transparency": lambda: saved("PNG", drawn(2600, 2600).convert("RGBA"), compress_level=1),
    "interlaced PNG": lambda: adam7(drawn(300, 200)),
    "TIFF": lambda: saved("TIFF", drawn(2600, 2600), compression="tiff_adobe_deflate"),
    "WebP": lambda: saved("WEBP", drawn(3000, 3000), method=0),
    "WebP of 64 megapixels": lambda: saved("WEBP", Pillow.new("RGB", (8000, 8000)), method=0, quality=0),
    "lossless WebP": lambda: saved("WEBP", drawn(2600, 2600), method=0, quality=0, lossless=True),
    "animated WebP": lambda: frames("WEBP", method=0),
    "animated PNG": lambda: frames("PNG", compress_level=1),
    "GIF": lambda: saved("GIF", drawn(1800, 1800)),
    "BMP": lambda: saved("BMP", drawn(2600, 2600)),
    "AVIF": lambda: saved("AVIF", drawn(2600, 2600), speed=10),
    "HEIC": lambda: heic(1400, 1400),
    "HEIC of tiles": lambda: heic(2048, 1536, tile_size=512),
    "JPEG 2000": lambda: saved("JPEG2000", drawn(1500, 1000)),
    "PDF": lambda: saved("PDF", drawn(1000, 1000)),
    "PDF of a scan": lambda: saved("PDF", drawn(2480, 3508), resolution=300),
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><circle r="5"/></svg>',
}
HUGE = {"JPEG of 200 megapixels", "PNG of 100 megapixels"}  # at one size only, to save time
#: Drawings and photographs for which the default AUTOTAG_MEMORY has to be enough, whatever is asked for.
ORDINARY = {
    "PNG with transparency",
    "WebP",
    "WebP of 64 megapixels",
    "PDF",
    "PDF of a scan",
    "SVG",
    "HEIC of tiles",
    "TIFF",
}
MEMORY = 512_000_000


@pytest.mark.parametrize("name", FILES)
def test_no_file_takes_more_than_it_says(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "own_memory", lambda: 0)
    path = tmp_path / "file"
    path.write_bytes(FILES[name]())
    done = subprocess.run(
        [sys.executable, "-c", CHILD, path, str(LIMIT), *map(str, SIDES[:1] if name in HUGE else SIDES)],
        capture_output=True,
        text=True,
        check=True,
    )
    for line in done.stdout.splitlines():
        found = json.loads(line)
        assert found["code"] is None
        assert found["grown"] <= found["need"] <= LIMIT, found
        if name in ORDINARY:
            assert found["need"] <= decode.Budget(MEMORY, 25_000_000).heavy, found
