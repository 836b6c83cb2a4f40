"""The notes about an image go into `tagging_result` with its answer; and the setting for the size of the sent image."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
from PIL import Image

from autotag.images.children import Decoded
from autotag.images.decode import Decoder
from lab.openai_sim.completion_request import first_image
from lab.openai_sim.vision import Picture
from support import Library, worker

NOTES = {"truncated": 0.97, "cropped": [0, 0, 1080, 10800], "frame": 3}


@pytest.fixture
def sent(library: Library, monkeypatch: pytest.MonkeyPatch) -> list[Image.Image]:
    """Collects the images that the provider receives."""
    simulator, images = library.stack.simulator, list[Image.Image]()
    read = simulator.read_picture

    async def keep(body: dict[str, Any]) -> Picture | None:
        url = first_image(body)
        if url:
            images.append(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
        return await read(body)

    monkeypatch.setattr(simulator, "read_picture", keep)
    return images


@pytest.mark.parametrize("lane", ["single calls", "a batch"])
async def test_notes_are_stored_with_the_answer(lane: str, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    if lane == "a batch":
        library.stack.configure(realtime_max_images=0, chunk_max_images=1, express_images=0)
        library.stack.simulator.plan.batch_latency = (0.1, 0.2)
    decode, noted = Decoder.decode, list[str]()

    async def decode_with_notes(self: Decoder, *arguments: Any) -> Any:
        decoded = await decode(self, *arguments)
        assert isinstance(decoded, Decoded)
        if not noted:
            noted.append("one")
            return Decoded(decoded.width, decoded.height, decoded.jpeg, NOTES)
        return decoded

    monkeypatch.setattr(Decoder, "decode", decode_with_notes)
    library.stack.prove()
    job = library.enqueue(await library.upload(3))
    async with worker(library.stack):
        [ended] = await library.finished(job)
    assert ended["completed"] == 3
    library.check_tags()
    images = [row["tagging_result"].get("image") for row in library.assets().values()]
    assert (images.count(NOTES), images.count(None)) == (1, 2), "nothing is said of ordinary images"


SAID: list[tuple[object, object]] = [
    (None, None), ([], None), ("x", None), ({}, None), ({"frame": None}, None), ({"a": {"b": 1}}, None),
    ({"Upper": 1, "a b": 1, "": 1, "x" * 31: 1}, None), ({"long": [1] * 9}, None), ({"texts": ["a"]}, None),
    ({"name": "a\u0001"}, {"name": "a\\x01"}), ({"name": "b" * 500}, {"name": "b" * 99 + "…"}), ({"big": 10**40}, None),
    ({"yes": True}, {"yes": True}), (NOTES, NOTES), ({f"n{i}": i for i in range(9)}, {f"n{i}": i for i in range(8)}),
]  # fmt: skip


def test_what_a_worker_says_of_an_image_is_checked(library: Library) -> None:
    for notes, kept in SAID:
        [row] = library.sql("select autotag.clean_image_notes(%s::jsonb) as notes", json.dumps(notes))
        assert row["notes"] == kept, notes


async def test_the_side_is_a_setting(library: Library, sent: list[Image.Image]) -> None:
    library.stack.prove()
    reserved = "select tokens_per_image as n from autotag.provider_limits"
    library.sql("select autotag.register_worker(gen_random_uuid(), 'test', autotag.schema_version(), true)")
    async with worker(library.stack):
        await library.finished(library.enqueue(await library.upload(1)))
        assert max(sent[-1].size) == 512
        before = library.sql(reserved)[0]["n"]
        library.stack.configure(image_side=256)
        await library.finished(library.enqueue(await library.upload(1, seed=2)))
        assert max(sent[-1].size) == 256
        assert library.sql(reserved)[0]["n"] < before, "a smaller image reserves fewer tokens"
    assert library.sql("select array_agg(image_side order by image_side) as n from autotag.learned")[0]["n"] == [0, 256]
