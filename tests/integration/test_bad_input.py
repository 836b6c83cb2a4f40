"""Bad input gets a clear error of its own, and nothing is partly stored."""

from __future__ import annotations

import json
import uuid
from typing import Any

import psycopg
import pytest

from lab.stack import Stack
from support import Library, rpc


def stored(library: Library) -> list[int]:
    """The number of rows that autotag has stored."""
    tables = ("jobs", "tasks", "batches", "queues", "workspaces", "usage")
    return [library.sql(f"select count(*) as n from autotag.{table}")[0]["n"] for table in tables]


def refused(library: Library, assets: Any) -> tuple[str, str, str, dict[str, Any]]:
    """Status, code, message and detail of the refusal of an upload."""
    before = stored(library)
    with pytest.raises(psycopg.Error) as caught:
        library.rpc("public.enqueue_tagging", assets)
    assert stored(library) == before, "a refused upload left something behind"
    diagnosis = caught.value.diag
    assert diagnosis.message_hint, "a refusal says what to do"
    detail = json.loads(diagnosis.message_detail or "{}")
    return str(diagnosis.sqlstate), detail["code"], str(diagnosis.message_primary), detail


def test_an_empty_list(library: Library) -> None:
    assert refused(library, [])[:2] == ("PT400", "no_images")


def test_an_unknown_asset_is_named(library: Library) -> None:
    unknown = str(uuid.uuid4())
    status, code, message, detail = refused(library, [*library.insert(["a.jpg", "b.jpg"]), unknown])
    assert (status, code, detail["asset_ids"]) == ("PT404", "unknown_asset", [unknown])
    assert message == "1 of the 3 images do not exist."


def test_an_asset_of_another_workspace(library: Library, stack: Stack) -> None:
    other = Library(stack)
    [theirs] = other.insert(["x.jpg"])
    [mine] = library.insert(["a.jpg"])
    foreign = refused(library, [mine, theirs])
    unknown = refused(library, [mine, never := str(uuid.uuid4())])
    assert foreign[:3] == unknown[:3], "what exists in another workspace is as unknown as what never was"
    assert (foreign[1], foreign[3]["asset_ids"], unknown[3]["asset_ids"]) == ("unknown_asset", [theirs], [never])


def test_assets_of_two_workspaces_of_the_same_user(library: Library, stack: Stack) -> None:
    other = Library(stack)
    library.sql("insert into public.workspace_members values (%s, %s)", other.member.workspace, library.member.user)
    assert refused(library, [*library.insert(["a.jpg"]), *other.insert(["x.jpg"])])[:2] == (
        "PT400", "several_workspaces",
    )  # fmt: skip


def test_assets_of_many_workspaces_name_five_of_them(library: Library, stack: Stack) -> None:
    assets = library.insert(["a.jpg"])
    for _ in range(6):
        other = Library(stack)
        library.sql("insert into public.workspace_members values (%s, %s)", other.member.workspace, library.member.user)
        assets += other.insert(["x.jpg"])
    _, code, message, detail = refused(library, assets)
    assert (code, len(detail["workspace_ids"])) == ("several_workspaces", 5)
    assert "7 workspaces" in message
    assert message.endswith("and 2 more.")


def test_50001_assets(library: Library) -> None:
    ids = [str(uuid.UUID(int=i)) for i in range(50_001)]
    status, code, _, detail = refused(library, ids)
    assert (status, code, detail["max_images"]) == ("PT413", "too_many_images", 50_000)


def test_a_null_among_the_ids(library: Library) -> None:
    assert refused(library, [*library.insert(["a.jpg"]), None])[:2] == ("PT400", "bad_asset_ids")


def test_anon_may_call_nothing(library: Library, stack: Stack) -> None:
    for function, arguments in (
        ("public.enqueue_tagging", ([str(uuid.uuid4())],)),
        ("public.tagging_job", (str(uuid.uuid4()),)),
        ("public.check_rate_limit", (library.member.workspace, "realtime", 1)),
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            rpc(stack, None, function, *arguments)


def test_somebody_elses_job_is_unknown(library: Library, stack: Stack) -> None:
    job = library.enqueue(library.insert(["a.jpg"]))["job_id"]
    stranger = Library(stack)
    for function in ("public.tagging_job", "public.cancel_tagging", "public.retry_tagging"):
        with pytest.raises(psycopg.Error) as caught:
            stranger.rpc(function, job)
        assert caught.value.diag.sqlstate == "PT404"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("realtime", 0), "no_images"),
        (("realtime", -1), "no_images"),
        (("realtime", 2**31 - 1), "too_many_images"),
        ((None, 1), "unknown_request_type"),
    ],
)
def test_nonsense_asked_of_the_rate_limiter_counts_nothing(
    library: Library, arguments: tuple[Any, ...], code: str
) -> None:
    with pytest.raises(psycopg.Error) as caught:
        library.rpc("public.check_rate_limit", library.member.workspace, *arguments)
    assert json.loads(caught.value.diag.message_detail or "{}")["code"] == code
    assert library.sql("select * from public.workspace_rate_limits") == []


def test_the_same_upload_twice_is_one_job(library: Library) -> None:
    assets = library.insert(["a.jpg", "b.jpg", "c.jpg"])
    first = library.enqueue([*assets, assets[0]])
    again = library.enqueue(assets)
    assert (first["image_count"], first["skipped"]) == (3, 0)
    assert (again["image_count"], again["skipped"], again["job_id"]) == (0, 3, first["job_id"])
    more = library.enqueue([*assets, *library.insert(["d.jpg"])])
    assert (more["image_count"], more["skipped"]) == (1, 3)
    assert library.sql("select count(*) as n from autotag.tasks")[0]["n"] == 4
