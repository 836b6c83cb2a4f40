"""The edge function auto_tag_asset, run by Deno: what an old client calls for every image."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from deno import endless, served

from support import Library, worker


async def test_an_old_client_gets_its_images_tagged(library: Library) -> None:
    assets = await library.upload(4)
    headers = {"authorization": f"Bearer {library.member.token}"}
    async with served("auto_tag_asset", library.stack) as url, httpx.AsyncClient(headers=headers) as client:
        answers = [
            await client.post(url, json={"asset_id": assets[0]}),
            await client.post(url, json={"assetIds": assets[1:]}),
            await client.post(url, json={"asset_id": assets[0]}),
        ]
        assert (await client.options(url)).headers["access-control-allow-origin"] == "*"
    assert [(a.status_code, a.json()["image_count"], a.json()["skipped"]) for a in answers] == [
        (202, 1, 0), (202, 3, 0), (202, 0, 1)]  # fmt: skip
    async with worker(library.stack):
        await library.finished(*(answer.json() for answer in answers[:2]))
    library.check_tags()


@pytest.mark.parametrize(
    "body", [{}, [], "x", {"asset_id": 7.5}, {"asset_ids": [2**53]}, {"asset_ids": []}, {"asset_ids": "abc"}, None]
)
async def test_nonsense_is_refused(library: Library, body: Any) -> None:
    headers = {"authorization": f"Bearer {library.member.token}"}
    async with served("auto_tag_asset", library.stack) as url, httpx.AsyncClient() as client:
        answer = await client.post(url, json=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_asset")
        assert (await client.post(url, json={"asset_id": "x"})).status_code == 401
        assert (await client.get(url, headers=headers)).status_code == 405


async def test_a_body_that_is_too_large_is_not_read_to_its_end(library: Library) -> None:
    headers = {"authorization": f"Bearer {library.member.token}"}
    async with served("auto_tag_asset", library.stack) as url, httpx.AsyncClient() as client:
        assert (await client.post(url, content=b" " * 2_000_001, headers=headers)).status_code == 413
        status, _ = await endless(url, headers, 6_000_000)
        assert status == 413


async def test_what_is_somebody_elses_is_refused_as_the_rpc_refuses_it(library: Library) -> None:
    other = Library(library.stack)
    assets = other.insert(["a.jpg"])
    headers = {"authorization": f"Bearer {library.member.token}"}
    async with served("auto_tag_asset", library.stack) as url, httpx.AsyncClient(headers=headers) as client:
        answer = await client.post(url, json={"asset_ids": assets})
        wrong = await client.post(url, json={"asset_id": "no-uuid"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "PT404")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "22P02")
    assert library.sql("select * from autotag.jobs") == []
