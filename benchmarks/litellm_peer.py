"""Sends the requests in a file with LiteLLM's Router, with rpm and tpm set. Runs in a separate environment.

Arguments: base URL, key, file of [{at, bodies}], speed. The Router counts per minute of the clock, so its clock is sped
up like the simulator's.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOG"] = "ERROR"

import litellm
from litellm import Router
from litellm.router_strategy import lowest_tpm_rpm_v2

MAX_TRIES = 200  # after its own retries, the Router raises an error, and its user has to try again


def main() -> None:
    url, key, name, speed = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
    with open(name) as file:
        jobs = json.load(file)
    start = datetime.datetime.now(datetime.UTC)

    def compressed() -> datetime.datetime:
        return start + (datetime.datetime.now(datetime.UTC) - start) * speed

    lowest_tpm_rpm_v2.get_utc_datetime = compressed
    litellm.suppress_debug_info = True
    router = Router(
        model_list=[{
            "model_name": "tagger",
            "litellm_params": {
                "model": "openai/gpt-4o-mini", "api_base": url, "api_key": key, "rpm": 500, "tpm": 200_000,
            },
        }],
        routing_strategy="usage-based-routing-v2", enable_pre_call_checks=True, num_retries=5,
        retry_after=int(1 / speed), cooldown_time=1 / speed,
    )  # fmt: skip

    async def call(body: dict[str, Any]) -> None:
        arguments = {k: v for k, v in body.items() if k != "model"}
        for _ in range(MAX_TRIES):
            try:
                await router.acompletion(model="tagger", **arguments)
                return
            except Exception:  # noqa: BLE001 (retry after any error, as the Router's users do)
                await asyncio.sleep(1 / speed)
        raise RuntimeError(f"A call failed {MAX_TRIES} times")

    async def upload(job: dict[str, Any]) -> None:
        await asyncio.sleep(job["at"] / speed)
        await asyncio.gather(*(call(body) for body in job["bodies"]))

    async def run() -> None:
        await asyncio.gather(*(upload(job) for job in jobs))

    asyncio.run(run())


if __name__ == "__main__":
    main()
