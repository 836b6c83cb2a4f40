"""Small text and thin lines stay as readable as in a Lanczos picture of the same size, whatever the kind of file."""

from __future__ import annotations

import io

from PIL import Image as Pillow

from autotag.images.prepare import prepare_bytes
from lab.image_files import encoded
from lab.openai_sim.reading import read
from lab.scenes import scenes

KINDS: tuple[tuple[str, dict[str, object]], ...] = (
    ("PNG", {"compress_level": 1}), ("JPEG", {"quality": 95}), ("WEBP", {"quality": 95, "method": 0}),
    ("TIFF", {"compression": "tiff_lzw"}), ("BMP", {}), ("JPEG", {"quality": 95, "progressive": True}),
    ("PNG", {"compress_level": 1}), ("JPEG", {"quality": 95, "subsampling": 0}), ("JPEG2000", {}), ("GIF", {}),
)  # fmt: skip


def test_the_simulator_reads_as_much_as_in_a_reference() -> None:
    """The reference is a lossless Lanczos picture."""
    sent = lossless = blurred = facts = 0
    for number, scene in enumerate(scenes(40)):
        kind, options = KINDS[number % len(KINDS)]
        prepared = Pillow.open(io.BytesIO(prepare_bytes(encoded(scene.image, kind, **options), 512, 10**9).jpeg))
        best = scene.image.resize(prepared.size, Pillow.Resampling.LANCZOS)
        sent += read(prepared, scene)
        lossless += (readable := read(best, scene))
        if number < 8:
            blurred += readable - read(
                best.resize((best.width * 3 // 4, best.height * 3 // 4)).resize(best.size), scene
            )
        facts += len(scene.letters) + len(scene.lines)
    assert blurred > 8 * 3, "the reader notices when a picture is blurred"
    assert lossless < 0.99 * facts, "it is not too easy"
    assert sent >= lossless
