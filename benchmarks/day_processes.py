"""The processes of the day bench: `worker` is the real worker, but pictures are at hand and single calls are answered
inside the process (what fetching, scaling and HTTP cost is measured by `ceiling`); `provider` is the simulator, for
the batches, which it answers without looking at the pictures."""

from __future__ import annotations

import asyncio
import collections
import io
import os
import random
import sys
from typing import Any
from unittest import mock

import uvicorn
from PIL import Image as Pillow

from autotag.config import Settings, load_settings
from autotag.db import Image
from autotag.images.prepare import Images
from autotag.observability.logs import configure_logs
from autotag.worker.run import run_worker
from benchmarks.engine import ANSWER, PICTURE
from lab.openai_sim.app import Plan, Simulator
from lab.openai_sim.vision import Picture
from lab.stack import HOST

CALL = (2.0, 5.0)  # seconds of the day that a call takes
BATCH = (600.0, 3600.0)  # seconds of the day that an OpenAI Batch takes


class PicturesAtHand(Images):
    """Every image is the same small JPEG."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        out = io.BytesIO()
        Pillow.new("RGB", (48, 48), (200, 30, 30)).save(out, "JPEG")
        self._jpeg = out.getvalue()

    async def load(self, image: Image, largest_side: int) -> bytes:
        del image, largest_side
        return self._jpeg


class Provider(Simulator):
    """Answers of which only the count matters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.request_log = collections.deque(maxlen=0)  # type: ignore[assignment]  # nobody reads a million entries

    async def read_picture(self, body: dict[str, Any]) -> Picture:
        del body
        return PICTURE


def work(speed: float) -> None:
    """A worker whose provider's seconds pass so much faster."""

    async def complete(*_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        await asyncio.sleep(random.uniform(*CALL) / speed)
        return ANSWER, {}

    settings = load_settings(Settings)
    configure_logs(settings.log_level, settings.log_format)
    with (
        mock.patch("autotag.worker.run.Images", PicturesAtHand),
        mock.patch("autotag.openai.provider.complete", complete),
    ):
        asyncio.run(run_worker(settings))


def provide(speed: float, port: int) -> None:
    """The provider's batches."""
    low, high = BATCH
    plan = Plan(batch_latency=(low / speed, high / speed), speed=speed, queued_batch_tokens=10**12)
    uvicorn.run(Provider(plan).app(), host=HOST, port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        work(float(os.environ["SPEED"]))
    else:
        provide(float(os.environ["SPEED"]), int(sys.argv[2]))
