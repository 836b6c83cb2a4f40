"""Refusals tell a caller nothing about other tenants: what is theirs looks like what does not exist, and no error has an id
that the caller neither sent nor may see."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from support import Library

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


@dataclass
class Tenants:
    """Two tenants with an upload each; ours is a member of one."""

    ours: Library
    theirs: Library
    our_assets: list[str]
    their_assets: list[str]
    their_job: str

    def refusal(self, function: str, *arguments: Any) -> dict[str, str | None]:
        """The refusal of a call, with the ids that the caller sent replaced by their number."""
        with pytest.raises(psycopg.Error) as caught:
            self.ours.rpc(function, *arguments)
        diag = caught.value.diag
        parts = {
            "status": diag.sqlstate, "message": diag.message_primary, "detail": diag.message_detail,
            "hint": diag.message_hint, "constraint": diag.constraint_name, "table": diag.table_name,
        }  # fmt: skip
        sent = sorted({str(found) for found in UUID.findall(repr(arguments))})
        for name, text in parts.items():
            for i, one in enumerate(sent):
                text = text and text.replace(one, f"<{i}>")
            parts[name] = text
        return parts


@pytest.fixture
def tenants(library: Library) -> Tenants:
    theirs = Library(library.stack)
    our_assets, their_assets = (one.insert([f"{uuid.uuid4()}.jpg" for _ in range(3)]) for one in (library, theirs))
    return Tenants(library, theirs, our_assets, their_assets, theirs.enqueue(their_assets[:1])["job_id"])


@pytest.mark.parametrize("function", ["public.cancel_tagging", "public.retry_tagging", "public.tagging_job"])
def test_an_upload_of_others_looks_like_none(tenants: Tenants, function: str) -> None:
    told = tenants.refusal(function, tenants.their_job)
    assert told == tenants.refusal(function, str(uuid.uuid4()))
    assert not UUID.search(repr(told))


@pytest.mark.parametrize("own", [0, 2])
@pytest.mark.parametrize("live", [False, True])
def test_an_image_of_others_looks_like_none(tenants: Tenants, own: int, live: bool) -> None:
    ours = tenants.our_assets[:own]
    told = tenants.refusal("public.enqueue_tagging", [*ours, tenants.their_assets[0 if live else 1]])
    missing = [*ours, str(uuid.UUID(int=uuid.UUID(tenants.their_assets[0]).int ^ 1))]
    assert told["message"] == tenants.refusal("public.enqueue_tagging", missing)["message"]
    assert told["status"] == "PT404"
    assert tenants.theirs.member.workspace not in repr(told)
    assert not UUID.search(repr(told)), "only what was sent"


@pytest.mark.parametrize(
    ("function", "more"),
    [("public.tagging_usage", ()), ("public.peek_rate_limit", ("realtime", 1)), ("public.check_rate_limit", ("batch", 1)),
     ("public.peek_rate_limit", (None, 1)), ("public.check_rate_limit", ("realtime", 0))],
)  # fmt: skip
def test_a_workspace_of_others_looks_like_none(tenants: Tenants, function: str, more: tuple[Any, ...]) -> None:
    told = tenants.refusal(function, tenants.theirs.member.workspace, *more)
    assert told == tenants.refusal(function, str(uuid.uuid4()), *more)
    assert told["status"] == "PT403"
    assert not UUID.search(repr(told))


def test_images_of_three_workspaces_name_none_that_is_not_ours(tenants: Tenants) -> None:
    """The caller is a member of two of the three workspaces. The refusal is about the third, and does not name it."""
    second = tenants.ours.stack.add_member()
    tenants.ours.sql("insert into public.workspace_members values (%s, %s)", second.workspace, tenants.ours.member.user)
    more = Library(tenants.ours.stack, second).insert([f"{uuid.uuid4()}.jpg"])
    told = tenants.refusal("public.enqueue_tagging", [*tenants.our_assets, *more, tenants.their_assets[1]])
    assert (told["status"], UUID.findall(repr(told))) == ("PT404", [])
    told = tenants.refusal("public.enqueue_tagging", [*tenants.our_assets, *more])
    assert told["status"] == "PT400"
    assert set(UUID.findall(repr(told))) == {second.workspace, tenants.ours.member.workspace}


def test_a_failed_image_that_moved_to_others_is_not_retried_and_not_named(tenants: Tenants) -> None:
    ours = tenants.ours
    # pictures on the web: for files, the rule that they belong to their workspace refuses the rows already
    ours.sql("update public.assets set storage_path = null, image_url = 'https://example.com/a.jpg' where id = any (%s::uuid[])",
             tenants.our_assets)  # fmt: skip
    job = ours.enqueue(tenants.our_assets)["job_id"]
    ours.rpc("public.cancel_tagging", job)
    ours.sql(
        "update public.assets set workspace_id = %s where id = %s",
        tenants.theirs.member.workspace,
        tenants.our_assets[0],
    )
    again = ours.rpc("public.retry_tagging", job)
    assert again["image_count"] == 2
    ours.rpc("public.cancel_tagging", again["job_id"])
    ours.sql("update public.assets set workspace_id = %s where workspace_id = %s", tenants.theirs.member.workspace,
             ours.member.workspace)  # fmt: skip
    told = tenants.refusal("public.retry_tagging", job)
    assert (told["status"], UUID.findall(repr(told))) == ("PT409", [])


def test_a_quota_that_others_filled_names_no_workspace(tenants: Tenants) -> None:
    """A user's quota counts all workspaces. Its refusal does not show a member which workspaces these are."""
    second = tenants.ours.stack.add_member()
    tenants.ours.sql("insert into public.workspace_members values (%s, %s)", second.workspace, tenants.ours.member.user)
    tenants.ours.sql("insert into autotag.quotas (scope, period, max_images) values ('user', 'day', 0)")
    told = tenants.refusal("public.enqueue_tagging", tenants.our_assets)
    assert (told["status"], UUID.findall(repr(told))) == ("PT429", [])
