"""What a file may cost is known before it is decoded: a child's memory never grows by more than `Opened.cost`."""

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

from images.odd_files import adam7, quarters, saved

LIMIT = 300_000_000
CHILD = """
import json, resource, sys
from pathlib import Path
from autotag.images.prepare import measure, prepare
from autotag.errors import TaggingError
path, limit = Path(sys.argv[1]), int(sys.argv[2])
idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
measured = measure(path, 512)
try:
    prepare(path, 512, limit)
    code = None
except TaggingError as error:
    code = error.code
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) * 1024
print(json.dumps({"cost": measured.cost, "grown": grown, "code": code}))
"""


def drawn(width: int, height: int) -> Pillow.Image:
    return quarters(width, height)


def heic(width: int, height: int, **options: int) -> bytes:
    out = io.BytesIO()
    pillow_heif.from_pillow(drawn(width, height)).save(out, quality=40, **options)
    return out.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "JPEG of 200 megapixels": lambda: saved("JPEG", Pillow.new("L", (16_000, 12_500), 99), quality=60),
    "progressive JPEG": lambda: saved("JPEG", drawn(3000, 2000), progressive=True),
    "PNG of 100 megapixels": lambda: saved("PNG", Pillow.new("L", (10_000, 10_000), 99), compress_level=1),
    "PNG with transparency": lambda: saved("PNG", drawn(2000, 1500).convert("RGBA"), compress_level=1),
    "interlaced PNG": lambda: adam7(drawn(300, 200)),
    "TIFF": lambda: saved("TIFF", drawn(3000, 2000), compression="tiff_adobe_deflate"),
    "WebP": lambda: saved("WEBP", drawn(1500, 1000), method=0),
    "lossless WebP": lambda: saved("WEBP", drawn(1500, 1000), method=0, quality=0, lossless=True),
    "GIF": lambda: saved("GIF", drawn(1500, 1000)),
    "BMP": lambda: saved("BMP", drawn(2000, 1500)),
    "AVIF": lambda: saved("AVIF", drawn(1500, 1000), speed=10),
    "HEIC": lambda: heic(1000, 700),
    "HEIC of tiles": lambda: heic(2048, 1536, tile_size=512),
    "JPEG 2000": lambda: saved("JPEG2000", drawn(1500, 1000)),
    "PDF": lambda: saved("PDF", drawn(2000, 1500)),
}


@pytest.mark.parametrize("name", FILES)
def test_no_file_takes_more_than_it_says(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(FILES[name]())
    done = subprocess.run([sys.executable, "-c", CHILD, path, str(LIMIT)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["code"] is None
    assert found["grown"] <= found["cost"] <= LIMIT, found
