"""An image whose row the caller cannot read does not exist for them. The project's own policies decide."""

from __future__ import annotations

import json

import psycopg
import pytest

from support import Library

MEMBERS = (
    "workspace_id in (select m.workspace_id from public.workspace_members m where m.user_id = (select auth.uid()))"
)
SEEN = 'create policy "members see the assets of their workspaces" on public.assets for select'
#: What hides the row {hidden} from members, and the error that they get.
WAYS = {
    "a policy of a condition": f"{SEEN} to authenticated using ({MEMBERS} and id <> '{{hidden}}')",
    "a policy to public": f"{SEEN} using (id <> '{{hidden}}')",
    "a restrictive policy": f"{SEEN} to authenticated using ({MEMBERS});"
    " create policy r on public.assets as restrictive for select to authenticated using (id <> '{hidden}')",
    "forced for the owner, too": f"{SEEN} to authenticated using (id <> '{{hidden}}');"
    " alter table public.assets force row level security",
    "only the id may be read": f"{SEEN} to authenticated using ({MEMBERS} and id <> '{{hidden}}');"
    " revoke select on public.assets from authenticated; grant select (id) on public.assets to authenticated",
}


def refusal(library: Library, *assets: str) -> tuple[str | None, str, str]:
    with pytest.raises(psycopg.Error) as refused:
        library.rpc("public.enqueue_tagging", list(assets))
    diag = refused.value.diag
    return diag.sqlstate, json.loads(diag.message_detail or "{}").get("code"), diag.message_primary or ""


def hide(library: Library, code: str) -> None:
    library.sql('drop policy "members see the assets of their workspaces" on public.assets')
    library.sql(code)


@pytest.mark.parametrize("way", WAYS)
def test_a_hidden_row_is_no_image(library: Library, way: str) -> None:
    seen, hidden = library.insert(["a.jpg", "b.jpg"])
    missing = seen.translate(str.maketrans("0123456789abcdef", "123456789abcdef0"))
    hide(library, WAYS[way].format(hidden=hidden))
    told = refusal(library, seen, hidden)
    assert told == refusal(library, seen, missing)
    assert told[:2] == ("PT404", "unknown_asset")
    assert library.rpc("public.enqueue_tagging", [seen])["image_count"] == 1
    [server] = library.sql("select to_jsonb(public.enqueue_tagging(array[%s::uuid])) as job", hidden)
    assert server["job"]["image_count"] == 1, "the project's server sees every row"


def test_a_policy_that_raises_is_one_clear_refusal(library: Library) -> None:
    [asset] = library.insert(["a.jpg"])
    hide(library, f"{SEEN} to authenticated using (1 / (length(workspace_id::text) - 36) = 1)")
    state, code, message = refusal(library, asset)
    assert (state, code) == ("PT403", "unreadable_rows")
    assert "division by zero" in message


def test_a_policy_of_files_that_raises_tells_nothing(library: Library) -> None:
    """Rows are checked before files, so a hidden image looks like a missing one. The message leaves out the error's
    text, because that can name any file."""
    shown, hidden = library.insert(["seen.jpg", "hidden.jpg"])
    missing = shown.translate(str.maketrans("0123456789abcdef", "123456789abcdef0"))
    library.sql("insert into storage.objects (bucket_id, name) select 'assets', storage_path from public.assets")
    hide(library, WAYS["a policy of a condition"].format(hidden=hidden))
    library.sql(
        'alter policy "members read the images of their workspaces" on storage.objects'
        " using (split_part(name, '/', 2)::uuid is not null)"
    )
    told = refusal(library, hidden)
    assert told == refusal(library, missing)
    assert told[:2] == refusal(library, shown, hidden)[:2] == ("PT404", "unknown_asset")
    state, code, message = refusal(library, shown)
    assert (state, code) == ("PT403", "unreadable_files")
    assert "22P02" in message
    assert ".jpg" not in message
    [server] = library.sql("select to_jsonb(public.enqueue_tagging(%s::uuid[])) as job", [shown, hidden])
    assert server["job"]["image_count"] == 2


@pytest.mark.parametrize("columns", ["tags", "tags, image_url, tagging_stage", "workspace_id"])
def test_whoever_may_read_any_column_has_to_see_the_row(library: Library, columns: str) -> None:
    seen, hidden = library.insert(["a.jpg", "b.jpg"])
    hide(library, WAYS["a restrictive policy"].format(hidden=hidden))
    library.sql("revoke select on public.assets from authenticated")
    library.sql(f"grant select ({columns}) on public.assets to authenticated")
    for asset in (seen, hidden):
        assert refusal(library, asset)[:2] == ("PT403", "unreadable_rows")
    [found] = library.sql("select autotag.diagnose_rows() as found")
    assert found["found"]["level"] == "warning"
    library.sql(found["found"]["fix"])
    assert refusal(library, hidden)[:2] == ("PT404", "unknown_asset")
    assert library.rpc("public.enqueue_tagging", [seen])["image_count"] == 1
    library.sql("alter table public.assets disable row level security")
    library.sql("revoke select on public.assets from authenticated")
    library.sql(f"grant select ({columns}) on public.assets to authenticated")
    assert library.rpc("public.enqueue_tagging", [hidden])["image_count"] == 1, "no row is hidden"


def test_without_the_privilege_to_read_membership_decides(library: Library) -> None:
    [asset] = library.insert(["a.jpg"])
    hide(library, "revoke select on public.assets from authenticated")
    assert library.rpc("public.enqueue_tagging", [asset])["image_count"] == 1


def test_a_retry_leaves_hidden_rows_out(library: Library) -> None:
    seen, hidden = library.insert(["a.jpg", "b.jpg"])
    job = library.enqueue([seen, hidden])["job_id"]
    library.rpc("public.cancel_tagging", job)
    hide(library, WAYS["a restrictive policy"].format(hidden=hidden))
    again = library.rpc("public.retry_tagging", job)
    assert again["image_count"] == 1
    tasks = library.sql("select asset_id::text as asset from autotag.tasks where job_id = %s", again["job_id"])
    assert [task["asset"] for task in tasks] == [seen]
    library.rpc("public.cancel_tagging", again["job_id"])
    library.sql("create policy nobody on public.assets as restrictive for select to authenticated using (false)")
    with pytest.raises(psycopg.Error) as refused:
        library.rpc("public.retry_tagging", job)
    assert "nothing_to_retry" in (refused.value.diag.message_detail or "")
