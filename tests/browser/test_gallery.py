"""The demo's page in headless Chromium: users see their own images live, and nobody else's."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from chromium import need_chromium, play

from autotag.http.serve import serve
from forked import run_command
from lab.openai_sim.faults import Fault
from lab.page import address, make_page
from lab.pictures import draw
from lab.postgres import free_port
from lab.stack import HOST
from support import Library, audit, worker

#: Set to a folder (docs/screenshots) to keep what the tests photograph.
SHOTS = os.environ.get("AUTOTAG_SCREENSHOTS")


@dataclass
class Gallery:
    """The pages of a library's member, of another workspace's member, and of that member with the first one's
    address."""

    library: Library
    mine: str
    other: str
    stranger: str
    folder: Path

    def files(self, count: int, seed: int = 1) -> list[str]:
        paths = []
        for drawing in draw(count, seed):
            path = self.folder / drawing.name
            path.write_bytes(drawing.data)
            paths.append(str(path))
        return paths

    async def play(self, scenario: str, files: list[str]) -> dict[str, Any]:
        """Runs the scenario and returns what it saw. An error in the page fails the test."""
        given = {"mine": self.mine, "other": self.other, "stranger": self.stranger, "files": files, "shots": SHOTS,
                 "tag": TYPED}  # fmt: skip
        return await play("gallery.mjs", scenario, given)


TYPED = 'Aunt "Mary" <b>\\o/</b>'  # a tag that a person types; it stays text everywhere


@pytest.fixture
async def gallery(library: Library, tmp_path: Path) -> AsyncIterator[Gallery]:
    need_chromium()
    port = free_port()
    url = f"http://{HOST}:{port}"
    async with serve(make_page(library.stack), HOST, port):
        other = library.stack.add_member()
        stranger = replace(other, workspace=library.member.workspace)
        yield Gallery(library, *(address(url, member) for member in (library.member, other, stranger)), tmp_path)


def make_members_editors(library: Library) -> None:
    """Does the same as ``autotag init --editors members``."""
    library.sql("create or replace function autotag.is_editor(p_workspace_id autotag.workspace_id) returns boolean"
                " language sql stable security definer as 'select autotag.is_member(p_workspace_id)'")  # fmt: skip


@pytest.mark.long
async def test_a_few_images_live_in_two_windows_and_in_no_strangers(gallery: Gallery) -> None:
    files = gallery.files(8)
    async with worker(gallery.library.stack):
        seen = await gallery.play("few", files)
    tags = {asset: row["tags"] for asset, row in gallery.library.assets().items()}
    for window in (seen["one"], seen["two"]):
        assert {item["id"]: item["tags"] for item in window} == tags
        assert all(item["picture"] and item["alt"].startswith("A ") for item in window), (
            "pictures, and captions as alt text"
        )
    assert sorted(map(frozenset, tags.values()), key=sorted) == sorted((d.tags for d in draw(8)), key=sorted)
    assert seen["other"] == []
    assert seen["writable"] == [], "members who are no editors only read vocabulary and instructions"
    assert seen["askedWhileIdle"] == 0, "no polling"
    [row] = seen["usage"]
    assert row.split("\t")[1] == "8"
    audit(gallery.library.stack)


async def test_peoples_tags_stay_and_only_the_vocabulary_is_used(gallery: Gallery) -> None:
    library = gallery.library
    make_members_editors(library)
    library.stack.configure(repeat_window="0")
    async with worker(library.stack):
        seen = await gallery.play("edited", gallery.files(2))
    for window in seen["rerun"]:
        assert {TYPED, "wedding"} <= set(window["tags"]), "what both windows have typed is there"
        assert seen["gone"] not in window["tags"], "what a person has removed is not"
        given = dict(zip(window["tags"], window["by"], strict=True))
        assert given.pop(TYPED) == given.pop("wedding") == "person"
        assert len(given) >= 4
        assert all(by.startswith("AI ") and by.endswith(" %") for by in given.values())
    for window in seen["only"]:
        assert sorted(window["tags"]) == sorted([TYPED, "wedding", seen["wanted"].upper()]), "as the vocabulary has it"
    assert sorted(library.assets()[seen["id"]]["tags"]) == sorted(seen["only"][0]["tags"])
    assert (seen["words"], seen["mode"]) == ([seen["wanted"].upper()], "only")
    assert seen["stranger"]["images"] == []
    assert not seen["stranger"]["asked"]
    assert not any(tag in seen["stranger"]["text"] for tag in (TYPED, seen["wanted"], seen["wanted"].upper()))
    assert seen["refusals"].pop("written") == []
    assert set(seen["refusals"].values()) == {"not_a_member"}


@pytest.mark.long
async def test_many_images_pass_through_every_stage(gallery: Gallery) -> None:
    stack = gallery.library.stack
    count = 60 if SHOTS else 20
    stack.configure(broadcast_interval="0.2 s", chunk_max_images=10, express_images=0, batch_poll_interval="0.3 s")
    # Rows that are submitted are told of a second after the message that the batch was (`Stages.follow_up`).
    # Each stage lasts several times as long, for busy machines.
    stack.simulator.plan.batch_validation, stack.simulator.plan.batch_latency = 4, (5, 5)
    async with worker(stack):
        seen = await gallery.play("many", gallery.files(count))
    texts = seen["seen"]
    assert {"submitted", "processing", "completed"} <= set(texts)
    assert texts["submitted"] == "Submitted to AI"
    assert texts["processing"].startswith("AI analyzing (")
    assert seen["images"] == count
    told = gallery.library.sql("select count(*) as n from realtime.messages where topic like 'tagging:%%'")[0]["n"]
    assert seen["assets"] <= told + 5, "it fetches when it is told, and not by the clock"


@pytest.mark.long
async def test_while_images_are_tagged_in_three_batches_nothing_is_polled(gallery: Gallery) -> None:
    """The page sends requests only after messages, and few of them, because messages are a second apart. There are more
    images than the page requests by ids (MAX_IDS)."""
    stack = gallery.library.stack
    stack.configure(broadcast_interval="1 s", chunk_max_images=20, batch_max_images=60, batch_split_images=40)
    stack.simulator.plan.batch_latency = (3, 4)
    await gallery.library.upload(120)
    async with worker(stack):
        seen = await gallery.play("patient", [])
    told = gallery.library.sql("select count(*) as n from realtime.messages where topic like 'tagging:%%'")[0]["n"]
    assert seen["count"] == 120
    assert set(seen["asked"]) <= {"/rest/v1/assets", "/rest/v1/rpc/tagging_usage"}
    assert sum(seen["asked"].values()) <= told + 2, "what was told, the upload's own look, and the usage at the end"
    assert len(gallery.library.sql("select 1 from autotag.batches")) == 3


async def test_a_lost_websocket_is_made_up_for(gallery: Gallery) -> None:
    async with worker(gallery.library.stack):
        seen = await gallery.play("lost", gallery.files(3))
    assert seen["sockets"] >= 2
    assert seen["connection"] == "Live"


async def test_files_chosen_while_the_page_still_loads_are_taken(gallery: Gallery) -> None:
    async with worker(gallery.library.stack):
        await gallery.play("early", gallery.files(3))


async def test_a_failed_image_says_why_and_is_tried_again(gallery: Gallery) -> None:
    gallery.library.stack.simulator.faults.add(Fault(answer="refusal"))
    async with worker(gallery.library.stack):
        seen = await gallery.play("failed", gallery.files(3))
    [failed] = [item for item in seen["before"] if item["stage"] == "failed"]
    assert failed["error"] == "The AI declined to describe this image."
    assert all(item["tags"] for item in seen["after"])


async def test_cancelling_keeps_what_is_done(gallery: Gallery) -> None:
    gallery.library.stack.configure(chunk_delay="20 s")
    async with worker(gallery.library.stack):
        seen = await gallery.play("cancelled", gallery.files(12))
    assert sorted(seen["stages"]) == ["completed"] * 5 + ["failed"] * 7
    assert "7 not tagged" in seen["job"]


async def test_a_quota_is_explained(gallery: Gallery) -> None:
    gallery.library.sql("insert into autotag.quotas (scope, period, max_images) values ('workspace', 'day', 3)")
    seen = await gallery.play("refused", gallery.files(5))
    assert seen["notice"].startswith(
        "The daily quota of this workspace allows 3 more images today. Upload fewer images"
    )


async def test_it_looks_right_narrow_and_wide_light_and_dark(gallery: Gallery) -> None:
    stack = gallery.library.stack
    stack.simulator.faults.add(Fault(answer="refusal"))
    assets = await gallery.library.upload(8)
    async with worker(stack):
        await gallery.library.finished(gallery.library.enqueue(assets))
    library = gallery.library
    library.enqueue(await library.upload(3, seed=2))
    library.sql("update public.assets set tags = tags || array['aunt mary', %s] where id = %s", "long " * 20, assets[1])
    library.sql("select public.set_tagging_vocabulary(%s, %s)", library.member.workspace, json.dumps(
        [{"tag": f"{'Very' * (i == 3) * 10} tag {i}", "aliases": [f"kitty {i}", f"pussycat {i}"][: i % 3], "parent": "Animal" if i % 2 else None}
         for i in range(40)]))  # fmt: skip
    make_members_editors(library)
    seen = await gallery.play("looks", [])
    assert len({look["paper"] for look in seen["results"]}) == 2, "light and dark"
    for look in seen["results"]:
        assert look["violations"] == [], look
        assert not look["sideways"], look


async def test_the_page_of_a_comparison_looks_right(gallery: Gallery, tmp_path: Path) -> None:
    """Twelve images that one model has tagged, compared with another model; some tags are changed by hand."""
    library, page = gallery.library, tmp_path / "comparison.html"
    library.stack.configure(model="gpt-4.1-mini", realtime_requests_per_minute=1000)
    assets = await library.upload(12)
    async with worker(library.stack):
        await library.finished(library.enqueue(assets))
    library.sql("update public.assets set tags = tags || array['bright colours'] where id = any (%s)", assets[:5])
    library.sql("update public.assets set tags = tags[2:] where id = any (%s)", assets[3:6])
    code, _, error = await run_command(
        "compare", "--workspace", library.member.workspace, "--model", "gpt-6-luna", "--yes", "--html", str(page),
        environment={"PATH": os.environ["PATH"], **library.stack.operator_environment()},
    )  # fmt: skip
    assert code == 0, error
    seen = await gallery.play("comparison", [str(page)])
    for result in seen["results"]:
        assert result["violations"] == [], result
        assert not result["sideways"], result
