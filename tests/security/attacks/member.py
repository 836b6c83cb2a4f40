"""Attempts of a member against the limits of their own workspace, against the operator, and against other members."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

from attacks import api
from attacks.attempt import Answer, Attempt, Do, http
from attacks.scene import Scene
from lab.pictures import draw

QUOTA = 5  # images a day


async def furnish(scene: Scene) -> list[str]:
    """Stores ten images of the member, and sets a quota of half of them."""
    own = scene.member
    own.sql(
        "insert into autotag.quotas (user_id, scope, period, max_images) values (%s, 'user', 'day', %s)",
        own.member.user,
        QUOTA,
    )
    own.sql(
        "insert into autotag.quotas (workspace_id, scope, period, max_images) values (%s, 'workspace', 'month', %s)",
        own.member.workspace,
        QUOTA,
    )
    own.sql(
        "insert into public.workspace_rate_limits (workspace_id, request_type, max_requests) values (%s, 'realtime', 50)",
        own.member.workspace,
    )
    return await own.upload(list(draw(10, seed=30)), seed=30)


def tables(scene: Scene) -> list[Attempt]:
    """Attempts to change columns of the member's own workspace that its members may only read."""
    token, own, found = scene.token("member"), scene.member.member.workspace, []
    granted = {"id", "workspace_id", "storage_bucket", "storage_path", "image_url"}

    def add(name: str, method: str, table: str, expect: str = r"403 42501", **request: Any) -> None:
        found.append(Attempt(f"member {name}", http(token, method, f"/rest/v1/{table}", **request), expect))

    there = api.columns(scene)
    for table, column in ((table, column) for table, names in there.items() for column in names):
        key = api.workspace_key(table, there[table])
        which = f"{key}=eq.{own}" if key in api.KEYS else f"{key}=not.is.null"
        expect = (
            r"204 -" if (table, column) == ("assets", "tags") else r"403 42501"
        )  # people edit tags, and nothing else
        add(f"changes {table}.{column}", "PATCH", table, expect, body={column: None}, query=which)
        if table != "assets" or column not in granted:
            body = (
                {key: own, "storage_path": f"{own}/x.jpg", column: None}
                if table == "assets"
                else ({key: own} if key in api.KEYS else {}) | {column: None}
            )
            add(f"adds a row with {table}.{column}", "POST", table, body=body)
    for table in ("workspaces", "workspace_members", "workspace_rate_limits"):
        key = "id" if table == "workspaces" else "workspace_id"
        add(f"deletes from {table}", "DELETE", table, query=f"{key}=eq.{own}")
    add("invites somebody", "POST", "workspace_members", body={"workspace_id": own, "user_id": scene.nobody})
    add("joins another workspace", "POST", "workspace_members",
        body={"workspace_id": scene.ids["workspace"], "user_id": scene.member.member.user})  # fmt: skip
    theirs = scene.ids["path"]
    for path, bucket in (
        (theirs, None), (f"{own}/../{theirs}", None), (f"{own}/./{theirs}", None), (f"{own}/..", None), (f"/{own}/x.jpg", None),
        (f"{own.upper()}/x.jpg", None), (f"{own}\\..\\{theirs}", None), (f"./{own}/x.jpg", None), ("", None), ("x.jpg", None),
        (f" {own}/x.jpg", None), (f"{own}/x.jpg", "private"), (f"{own}/x.jpg", ""), (f"{own}/x.jpg", "assets/../private"),
        (f"{own}/x.jpg", "ASSETS"), (f"{own}%2f..%2f{theirs}", None), (f"{scene.ids['workspace']}/new.jpg", None),
    ):  # fmt: skip
        row = {"workspace_id": own, "storage_path": path, "storage_bucket": bucket}
        add(f"adds a row that names {path!r} in {bucket!r}", "POST", "assets", body=row)
    add("takes an id that is there", "POST", "assets", r"409 23505",
        body={"id": scene.ids["asset"], "workspace_id": own, "storage_path": f"{own}/x.jpg"})  # fmt: skip
    for path in (f"{own}/%2e%2e/{theirs}", f"{own}/..%2f{theirs}", f"{own}//x.jpg"):
        add(
            f"adds a row with the odd name {path!r}",
            "POST",
            "assets",
            r"201 -",
            body={"workspace_id": own, "storage_path": path},
        )
    return found


def rpcs(scene: Scene) -> list[Attempt]:
    """Calls of RPCs with hostile arguments about the member's own rows, and attempts at the victim's files."""
    return [*api.rpcs(scene, "member", own=True), *api.storage(scene, "member")]


def _rpc(function: str, **body: Any) -> Do:
    async def do(scene: Scene) -> Answer:
        return await http(scene.token("member"), "POST", f"/rest/v1/rpc/{function}", body=body)(scene)

    return do


# Long: the attempts of one member in their order; each depends on those before it.
def limits(scene: Scene, assets: list[str]) -> list[Attempt]:
    """Attempts to get around the quota, and to take from the limit that only the server may use."""
    own = scene.member.member.workspace
    found = []

    def add(name: str, do: Do, expect: str) -> None:
        found.append(Attempt(f"member {name}", do, expect))

    for kind in ("realtime", "batch"):
        for images in (1, 10, 50_000):
            add(
                f"takes an allowance of {images} {kind}",
                _rpc("check_rate_limit", workspace_id=own, request_type=kind, image_count=images),
                r"403 PT403",
            )
            add(
                f"looks at an allowance of {images} {kind}",
                _rpc("peek_rate_limit", workspace_id=own, request_type=kind, image_count=images),
                r"200 json",
            )
    add("uploads more than the quota", _rpc("enqueue_tagging", asset_ids=assets[: QUOTA + 1]), r"429 PT429")
    add(
        "uploads each image twice, and more than the quota",
        _rpc("enqueue_tagging", asset_ids=assets[: QUOTA + 1] * 2),
        r"429 PT429",
    )

    async def all_at_once(scene: Scene) -> Answer:
        calls = [_rpc("enqueue_tagging", asset_ids=[asset])(scene) for asset in assets]
        answers = await asyncio.gather(*calls)
        taken = sum(answer.outcome.startswith("200") for answer in answers)
        return Answer(
            f"{taken} taken", " ".join(answer.received for answer in answers), " ".join(a.sent for a in answers)
        )

    add("uploads ten at the same time", all_at_once, f"{QUOTA} taken")
    add("uploads one more", _rpc("enqueue_tagging", asset_ids=assets), r"429 PT429")

    async def cancel_and_again(scene: Scene) -> Answer:
        """Uploads again after a cancellation, which gives back only images that were not sent."""
        jobs = scene.member.sql(
            "select id::text from autotag.jobs where workspace_id = %s and finished_at is null order by id", own
        )
        for job in jobs[:2]:
            await _rpc("cancel_tagging", job_id=job["id"])(scene)
            await _rpc("retry_tagging", job_id=job["id"])(scene)
            await _rpc("retry_tagging", job_id=job["id"])(scene)
        [live] = scene.member.sql(
            "select coalesce(sum(image_count - completed - failed), 0) as n from autotag.jobs where workspace_id = %s", own)  # fmt: skip
        return Answer(f"{live['n']} live")

    for i in range(10):
        add(f"cancels and retries, round {i}", cancel_and_again, rf"[0-{QUOTA}] live")

    async def delete_and_insert(scene: Scene) -> Answer:
        """Uploads the same images under new rows, and other images under the same ids."""
        token = scene.token("member")
        live = scene.member.sql(
            "select asset_id::text as id from autotag.tasks where workspace_id = %s and finished_at is null", own
        )
        for row in live:
            await http(token, "DELETE", "/rest/v1/assets", query=f"id=eq.{row['id']}")(scene)
            body = {"id": row["id"], "workspace_id": own, "storage_path": f"{own}/{uuid.uuid4()}.jpg"}
            await http(token, "POST", "/rest/v1/assets", body=body)(scene)
            await _rpc("enqueue_tagging", asset_ids=[row["id"]])(scene)
        answer = await _rpc("enqueue_tagging", asset_ids=assets)(scene)
        return Answer(answer.outcome, answer.received, answer.sent + str(assets))

    add("deletes what is being tagged and uploads again", delete_and_insert, r"4\d\d .*")
    for _ in range(3):
        add("uploads the rest", _rpc("enqueue_tagging", asset_ids=assets[QUOTA:]), r"4\d\d PT4.*|200 json")
    add("asks for a strategy of very many", _rpc("tagging_strategy", image_count=50_000), r"200 json")
    add("opens the operator's mode", _rpc("set_automatic", p_on=True), r"404 PGRST202")
    for name in ("pause_tagging", "stage_rank", "backfill", "register_worker", "housekeeping", "tick"):
        add(f"calls the operator's {name}", _rpc(name), r"404 PGRST202")
    return [*found, *_traces(scene)]


def _traces(scene: Scene) -> list[Attempt]:
    """Attempts to store hostile values by a header that is stored with an upload."""
    token, found = scene.token("member"), []
    for value in (
        "00-" + "g" * 32 + "-" + "0" * 16 + "-01",
        "x" * 5000,
        "00-'; drop table x",
        "{}",
        "\\u0000",
        "00-" + "0" * 32 + "-" + "0" * 16 + "-01; x",
    ):
        do = http(
            token,
            "POST",
            "/rest/v1/rpc/enqueue_tagging",
            body={"asset_ids": [str(uuid.uuid4())]},
            headers={"traceparent": value},
        )
        found.append(Attempt(f"member sends the traceparent {value[:30]}", do, r"4\d\d .*"))
    return found


def take_announcements(scene: Scene) -> int:
    """Deletes the messages on the public topic about uploads that ended without a batch (they name nobody), and returns
    their number."""
    return len(scene.victim.sql(
        "delete from realtime.messages where topic = 'batch-updates' and event = 'batch-complete' and not private"
        """ and payload - 'id' = '{"batch_id": null}' returning id"""))  # fmt: skip


def cheating(scene: Scene) -> list[str]:
    """Values in the member's rows that only a worker may write."""
    own = scene.member
    found = [f"changed: an asset has {row}" for row in own.sql(
        "select id, tags, tagging_result, tagging_stage from public.assets where workspace_id = %s and (tags is not null"
        " or tagging_result is not null or coalesce(tagging_stage, 'queued') not in ('queued', 'failed'))", own.member.workspace)]  # fmt: skip
    found += [
        f"changed: an odd trace {row}"
        for row in own.sql("select traceparent from autotag.jobs where traceparent is not null")
    ]
    return found
