"""Files of other programs, each with an option with which decoders have problems: the model sees what these programs
show.

`made/PROGRAM-ODDITY.KIND`: red, green, blue and yellow quarters, as avifenc, heif-enc, ImageMagick, cjpeg, opj_compress,
cwebp, Ghostscript, tiffcp, gifsicle, apngasm, Netpbm, tifffile, imagecodecs and sharp write them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from autotag.errors import TaggingError
from autotag.images.prepare import prepare
from images.judging import judge
from images.odd_files import COLOURS

FILES = sorted((Path(__file__).parent / "made").iterdir())
#: What nothing here decodes: by which word its user is told so.
REFUSED = {"imagecodecs-jpeg-ls.jpg": "JPEG-LS", "tifffile-jpegxl.tif": "JPEG XL", "tifffile-lerc.tif": "LERC"}


@pytest.mark.parametrize("file", FILES, ids=[file.name for file in FILES])
def test_file_of_another_program(file: Path) -> None:
    if file.name in REFUSED:
        with pytest.raises(TaggingError, match=REFUSED[file.name]) as caught:
            prepare(file, 512, 300_000_000)
        assert caught.value.code == "unsupported_format"
    else:
        prepared = prepare(file, 512, 300_000_000)
        assert not judge(prepared.jpeg, {"quarters": COLOURS})
        assert set(prepared.notes) <= {"kind", "pages"}, "nothing is missing"
