"""A plain script for a batch: whole files in memory and one UPDATE per row. Prints its times and memory as JSON."""

from __future__ import annotations

import io
import json
import os
import sys
import time

import psycopg
from openai import OpenAI
from PIL import Image

from autotag.db import Question
from autotag.images.sent import data_url
from autotag.openai.prompt import batch_line, request_body
from lab.machine import memory


def main(lines: int, workspace: str) -> None:
    """Builds and uploads the batch, waits for it, downloads the answers and stores them."""
    idle = memory(os.getpid(), "VmRSS")
    out = io.BytesIO()
    Image.new("RGB", (48, 48), (200, 30, 30)).save(out, "JPEG")
    url = data_url(out.getvalue())
    question = Question(0, "gpt-6-luna", "low", 10, "English", "none")
    client = OpenAI(api_key=os.environ["OPENAI_API_KEY"], base_url=os.environ["OPENAI_BASE_URL"])
    with psycopg.connect(os.environ["OWNER_URL"], autocommit=True) as owner:
        ids = [str(r[0]) for r in owner.execute(
            "select id from public.assets where workspace_id = %s limit %s", (workspace, lines))]  # fmt: skip
        started = time.monotonic()
        content = b"".join([batch_line(asset, request_body(question, url, 400)) for asset in ids])
        file = client.files.create(file=("plain.jsonl", content), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        built = time.monotonic() - started
        while client.batches.retrieve(batch.id).status != "completed":
            time.sleep(0.2)
        started = time.monotonic()
        output = client.batches.retrieve(batch.id).output_file_id or ""
        for line in client.files.content(output).content.splitlines():
            answer = json.loads(line)
            tags = json.loads(answer["response"]["body"]["choices"][0]["message"]["content"])
            owner.execute(
                "update public.assets set tags = %s, tagging_result = %s, tagging_stage = 'completed' where id = %s",
                ([tag["tag"] for tag in tags["tags"]], json.dumps(tags), answer["custom_id"]),
            )
        stored = time.monotonic() - started
    peak = memory(os.getpid(), "VmHWM")
    print(json.dumps({
        "build and upload (one picture, encoded once), s": round(built, 2), "download and store, s": round(stored, 2),
        "rows stored per second": round(lines / stored), "peak above idle, MB": round(peak - idle, 1),
    }))  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
