"""A worker tags each file of `cases`: checks what the provider received, or the user's message."""

from __future__ import annotations

import base64
import io
import json
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageStat

from lab.edge.storage import put_files
from lab.openai_sim.completion_request import first_image
from lab.openai_sim.vision import Picture
from support import Library, connected, worker

CASES = Path(__file__).with_name("cases")
EXPECTED: dict[str, dict[str, Any]] = json.loads((CASES / "expected.json").read_text())


def check(name: str, image: Image.Image, expected: dict[str, Any]) -> None:
    """Checks an image that was sent."""
    grey, (width, height) = image.convert("L"), image.size
    if "quarters" in expected:
        for n, colour in enumerate(expected["quarters"]):
            x, y = (0.25, 0.75)[n % 2] * width, (0.25, 0.75)[n // 2] * height
            seen = image.convert("RGB").getpixel((int(x), int(y)))
            assert isinstance(seen, tuple)
            assert all(abs(a - b) < 40 for a, b in zip(seen, colour, strict=True)), (name, n, seen, colour)
    if "dark_lines_at_least" in expected:
        column = [int(grey.getpixel((width // 2, y))) for y in range(height)]  # type: ignore[arg-type]
        row = [int(grey.getpixel((x, height // 2))) for x in range(width)]  # type: ignore[arg-type]
        assert max(map(dark_lines, (column, row))) >= expected["dark_lines_at_least"], name
    if "mean_grey_at_least" in expected:
        assert ImageStat.Stat(grey).mean[0] >= expected["mean_grey_at_least"], name
    low, high = grey.getextrema()
    assert isinstance(low, int)
    assert isinstance(high, int)
    if "contrast_at_least" in expected:
        assert high - low >= expected["contrast_at_least"], name
    if expected.get("gradient"):
        assert high - low > 150, name
    if "shortest_side_at_least" in expected:
        assert min(width, height) >= expected["shortest_side_at_least"], (name, image.size)
        assert max(width, height) <= expected["aspect_at_most"] * min(width, height), (name, image.size)


def dark_lines(values: list[int]) -> int:
    """The number of times that the brightness falls below the middle of its range."""
    middle = (min(values) + max(values)) / 2
    return sum(a >= middle > b for a, b in pairwise(values))


@pytest.mark.skipif(find_spec("autotag.images.kinds") is None, reason="prepare() reads only the common kinds")
async def test_every_case(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    stack, sent = library.stack, list[Image.Image]()
    stack.prove()
    read, wrong = stack.simulator.read_picture, list[str]()

    async def keep(body: dict[str, Any]) -> Picture | None:
        url = first_image(body)
        assert url
        sent.append(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
        return await read(body)

    monkeypatch.setattr(stack.simulator, "read_picture", keep)
    assert stack.files
    async with worker(stack, memory=2000):
        for name, expected in EXPECTED.items():
            path = f"{library.member.workspace}/{name}"
            with connected(stack.database_url()) as connection:
                put_files(connection, stack.files, "assets", [(path, "image/jpeg", (CASES / name).read_bytes())])
            [asset] = library.insert([path])
            sent.clear()
            [job] = await library.finished(library.enqueue_as_server([asset]))
            row = library.assets()[asset]
            if expected["expect"] == "tagged":
                if not job["completed"] or len(sent) != 1:
                    wrong.append(f"{name}: {row['tagging_error']}")
                    continue
                try:
                    check(name, sent[0], expected)
                except AssertionError as error:
                    wrong.append(f"{name}: {error}")
            else:
                [task] = library.sql("select error_code from autotag.tasks where job_id = %s", job["job_id"])
                if task["error_code"] != expected["expect"] or expected["names"] not in row["tagging_error"]:
                    wrong.append(f"{name}: {task['error_code']} {row['tagging_error']}")
    assert wrong == []
