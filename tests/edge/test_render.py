"""Storage's image transformations: the worker uses them, and they never fail an image."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pillow_heif
import pytest
from PIL import Image as Pillow
from structlog.testing import capture_logs

from autotag import db
from autotag.images import render
from autotag.images.load import Images
from autotag.images.sent import data_url
from lab.edge.render import TRANSFORMS
from lab.edge.storage import put_files
from lab.image_files import UPRIGHT, encoded, quarters
from lab.openai_sim.vision import recognise
from support import Library, connected

RIGHT_UP = 6  # EXIF orientation: stored turned left


@pytest.fixture
def transforms(library: Library) -> Iterator[Path]:
    assert library.stack.files
    switch = library.stack.files / TRANSFORMS
    switch.touch()
    yield switch
    switch.unlink(missing_ok=True)


class Project:
    """Images of the library's workspace, read with transformations."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.asked: list[str] = []

    @contextlib.asynccontextmanager
    async def images(self) -> AsyncIterator[Images]:
        stack = self.library.stack
        async with Images(
            supabase_url=stack.supabase_url, supabase_key=stack.secret_key, hosts=frozenset(), max_bytes=40_000_000,
            memory=2 * 10**9, transform=True,
        ) as images:  # fmt: skip
            assert images._storage
            original = images._storage.fetch

            async def fetch(location: str, download: object, **options: object) -> object:
                self.asked.append(location.split("/")[1])
                return await original(location, download, **options)  # type: ignore[arg-type]

            images._storage.fetch = fetch  # type: ignore[method-assign, assignment]
            yield images

    def store(self, name: str, data: bytes) -> db.Image:
        stack, path = self.library.stack, f"{self.library.member.workspace}/{name}"
        assert stack.files
        with connected(stack.database_url()) as connection:
            put_files(connection, stack.files, "assets", [(path, "image/jpeg", data)])
        return db.Image(task=1, asset_id="", bucket="assets", path=path, url=None, workspace="w")


def rotated() -> bytes:
    exif = Pillow.Exif()
    exif[0x0112] = RIGHT_UP
    return encoded(quarters(size=(2400, 1800)).transpose(Pillow.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)


async def test_the_worker_gets_a_small_upright_picture_of_a_large_photo(library: Library, transforms: Path) -> None:
    project, data = Project(library), rotated()
    async with project.images() as images:
        prepared = await images.load(project.store("a.jpg", data), 512)
    assert project.asked == ["render"], "the file itself was not read"
    assert recognise(data_url(prepared.jpeg)).tags[:5] == UPRIGHT
    with Pillow.open(io.BytesIO(prepared.jpeg)) as image:
        assert image.size == (512, 384)


def _heic() -> bytes:
    out = io.BytesIO()
    pillow_heif.from_pillow(quarters()).save(out, quality=90)
    return out.getvalue()


def _animation() -> bytes:
    blank, shown = Pillow.new("P", (80, 60)), quarters((80, 60)).convert("P")
    return encoded(shown, "GIF", save_all=True, append_images=[blank])


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("too many bytes", lambda: encoded(quarters(), "JPEG") + os.urandom(25_000_000)),
        ("too many pixels", lambda: encoded(quarters(size=(9000, 6000)), "JPEG", quality=30)),
        ("an animation", _animation),
    ],
)  # fmt: skip
async def test_what_storage_does_not_scale_is_read_as_it_is(
    name: str, make: object, library: Library, transforms: Path
) -> None:
    project = Project(library)
    async with project.images() as images:
        prepared = await images.load(project.store("a.jpg", make()), 512)  # type: ignore[operator]
        assert project.asked == ["render", "object"], name
        assert recognise(data_url(prepared.jpeg)).tags[:4] == UPRIGHT[:4]
        await images.load(project.store("b.jpg", rotated()), 512)
    assert project.asked[2:] == ["render"], "that was about one file"


async def test_heic_becomes_what_the_model_reads(library: Library, transforms: Path) -> None:
    project = Project(library)
    async with project.images() as images:
        assert recognise(data_url((await images.load(project.store("a.heic", _heic()), 512)).jpeg)).tags[:5] == UPRIGHT


async def test_a_strip_is_read_as_it_is(library: Library, transforms: Path) -> None:
    """A long strip is not transformed, because at 512 pixels a side it would be 20 pixels wide."""
    project = Project(library)
    async with project.images() as images:
        await images.load(project.store("a.png", encoded(quarters(size=(200, 5000)), "PNG")), 512)
    assert project.asked == ["render", "object"]


async def test_a_plan_without_transformations_is_asked_once(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(render, "monotonic", lambda: now)
    project, data = Project(library), encoded(quarters(), "JPEG")
    async with project.images() as images:
        with capture_logs() as logs:
            for name in "abc":
                await images.load(project.store(name, data), 512)
        assert project.asked == ["render", "object", "object", "object"]
        assert [line["reason"] for line in logs if line["event"] == "transformations_refused"] == [
            "The feature imageTransformation is not enabled for this resource"
        ]
        now += render.REFUSED_FOR + 1
        await images.load(project.store("d", data), 512)
    assert project.asked[4:] == ["render", "object"], "the plan may have changed"


async def test_a_missing_file_is_missing(library: Library, transforms: Path) -> None:
    project = Project(library)
    async with project.images() as images:
        image = project.store("a.jpg", b"")
        with pytest.raises(Exception, match="not in storage"):
            await images.load(db.Image(**{**image.__dict__, "path": image.path + "x"}), 512)  # type: ignore[operator]
