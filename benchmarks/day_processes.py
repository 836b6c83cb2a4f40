"""The processes of the day bench.

`worker` is the real worker, except that pictures are local and single calls are answered inside the process; `ceiling`
measures what fetching, scaling and HTTP cost. `provider` is the simulator for the batches, which does not decode the
pictures.
"""

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
from autotag.images.load import Images
from autotag.images.sent import Prepared
from autotag.observability.logs import configure_logs
from autotag.openai.records import Completion
from autotag.turns import Turns
from autotag.worker.run import run_worker
from benchmarks.engine import ANSWER, PICTURE
from lab.openai_sim.app import Plan, Simulator
from lab.openai_sim.vision import Picture
from lab.stack import HOST

CALL = (2.0, 5.0)  # seconds of simulated time for a call
BATCH = (600.0, 3600.0)  # seconds of simulated time for an OpenAI Batch


class LocalPictures(Images):
    """Every image is the same small JPEG."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        out = io.BytesIO()
        Pillow.new("RGB", (48, 48), (200, 30, 30)).save(out, "JPEG")
        self._prepared = Prepared(out.getvalue())

    async def load(self, image: Image, max_side: int, places: Turns | None = None) -> Prepared:
        del image, max_side, places
        return self._prepared


class Provider(Simulator):
    """A simulator that gives every picture the same tags."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.request_log = collections.deque(maxlen=0)  # type: ignore[assignment]  # a million entries would need too much memory

    async def read_picture(self, body: dict[str, Any]) -> Picture:
        del body
        return PICTURE


def work(speed: float) -> None:
    """Runs a worker whose single calls are ``speed`` times faster."""

    async def complete(*_: Any) -> Completion:
        await asyncio.sleep(random.uniform(*CALL) / speed)
        return Completion(ANSWER, {})

    settings = load_settings(Settings)
    configure_logs(settings.log_level, settings.log_format)
    with (
        mock.patch("autotag.worker.run.Images", LocalPictures),
        mock.patch("autotag.openai.provider.Provider.complete", complete),
    ):
        asyncio.run(run_worker(settings))


def provide(speed: float, port: int) -> None:
    """Runs the provider, whose batches are ``speed`` times faster."""
    low, high = BATCH
    plan = Plan(batch_latency=(low / speed, high / speed), speed=speed, queued_batch_tokens=10**12)
    uvicorn.run(Provider(plan).app(), host=HOST, port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        work(float(os.environ["SPEED"]))
    else:
        provide(float(os.environ["SPEED"]), int(sys.argv[2]))
