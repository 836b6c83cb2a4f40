"""A file belongs to a workspace: a member who may write rows gets tags of their own workspace's pictures only.

The worker reads Storage with a key that opens every file. So the database says where a file lies only when the row may
name it, at enqueue and again when a worker asks.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

import psycopg
import pytest

from lab.pictures import draw
from lab.stack import WORKER_ROLE, Stack
from support import Library, rpc, store_file, until, worker

#: Files that a row of the workspace {own} must not name; {theirs} is another one.
FOREIGN = [
    ("assets", "{theirs}/secret.jpg"), ("assets", "{own}/../{theirs}/secret.jpg"), ("assets", "./{theirs}/secret.jpg"),
    ("assets", "{own}/./secret.jpg"), ("assets", "{own}//..//{theirs}/secret.jpg"), ("assets", "/{theirs}/secret.jpg"),
    ("assets", "{own}"), ("assets", "{own}/"), ("assets", "assets/{theirs}/secret.jpg"), ("assets", "assets/assets/{own}/secret.jpg"),
    ("assets", "{OWN}/secret.jpg"), ("assets", "{own}\\..\\{theirs}\\secret.jpg"),
    ("assets", "x/{own}/secret.jpg"), ("assets", "{own}x/secret.jpg"), ("assets", "%2e%2e/{theirs}/secret.jpg"),
    ("assets", "{own}/a\nb.jpg"), ("assets", "secret.jpg"), ("assets", "{theirs}"), ("assets", "..\\{own}/secret.jpg"),
    ("private", "{own}/secret.jpg"), ("assets/../private", "{own}/secret.jpg"), ("..", "{own}/secret.jpg"), (".", "{own}/a"),
    ("", "{theirs}/secret.jpg"), ("assets/{theirs}", "{own}/secret.jpg"), ("Assets", "{own}/secret.jpg"), ("assets ", "{own}/a"),
    ("assets?", "{own}/a.jpg"), ("assets#", "{own}/a.jpg"), ("ａssets", "{own}/a.jpg"),
]  # fmt: skip
OWN = [("assets", "{own}/a.jpg"), (None, "{own}/a.jpg"), (None, "{own}/b c/ä (1).jpg"), (None, "{own}/..a/b..jpg"),
       # as supabase-js leaves them
       ("assets", "{own}//a.jpg"), ("assets", "/{own}/a.jpg "), ("assets", "assets/{own}/a.jpg"), ("", "{own}/a.jpg"), ("assets", "")]  # fmt: skip


def row(library: Library, bucket: str | None, path: str) -> str:
    """Inserts a row of the workspace as a login that may write any row."""
    [made] = library.sql(
        "insert into public.assets (workspace_id, storage_bucket, storage_path) values (%s, %s, %s) returning id::text",
        library.member.workspace, bucket, path,
    )  # fmt: skip
    return str(made["id"])


def fill(library: Library, theirs: str, text: str | None) -> str | None:
    own = library.member.workspace
    return text and text.replace("{own}", own).replace("{OWN}", own.upper()).replace("{theirs}", theirs)


def refusal(library: Library, user: str | None, asset: str) -> str | None:
    try:
        if user:
            rpc(library.stack, user, "public.enqueue_tagging", [asset])
        else:
            library.sql("select public.enqueue_tagging(%s::uuid[])", [asset])
    except psycopg.Error as error:
        return f"{error.sqlstate} {error.diag.message_detail}"
    return None


def test_no_upload_with_a_file_of_somebody_else(library: Library) -> None:
    theirs = library.stack.add_member("theirs").workspace
    for bucket, path in FOREIGN:
        asset = row(library, fill(library, theirs, bucket), fill(library, theirs, path) or "")
        for user in (library.member.user, None):
            told = refusal(library, user, asset)
            assert told is not None, (bucket, path)
            assert (told[:5], "foreign_file" in told) == ("PT403", True), (bucket, path)
        [told] = library.sql("select * from autotag.describe_assets(%s::uuid[])", [asset])
        assert (told["bucket"], told["path"], told["url"], told["refused"]) == (None, None, None, "foreign_file")
    for bucket, path in OWN:
        asset = row(library, bucket, fill(library, theirs, path) or "")
        assert refusal(library, library.member.user, asset) is None, (bucket, path)


def test_a_foreign_file_beside_a_url_hides_both(library: Library) -> None:
    theirs = library.stack.add_member("theirs").workspace
    [made] = library.sql(
        "insert into public.assets (workspace_id, storage_path, image_url) values (%s, %s, 'https://example.com/a.jpg')"
        " returning id::text", library.member.workspace, f"{theirs}/a.jpg",
    )  # fmt: skip
    assert "foreign_file" in (refusal(library, library.member.user, made["id"]) or "")


def point_at(library: Library, assets: list[str], path: str) -> None:
    library.sql("update public.assets set storage_path = %s where id = any (%s::uuid[])", path, assets)


@pytest.mark.parametrize("images", [3, 60], ids=["single calls", "a batch"])
async def test_rows_changed_after_the_upload_tell_nothing(library: Library, images: int) -> None:
    """The rows name files of their own workspace when they are enqueued, and another workspace's files later."""
    stack = library.stack
    theirs = Library(stack, stack.add_member("theirs"))
    [(secret, _)] = await theirs.upload_files([list(draw(80, 7))[79]])
    assets = await library.upload(images)
    job = library.enqueue(assets)
    point_at(library, assets[-2:], secret)
    async with worker(stack):
        [ended] = await library.finished(job)
    assert (ended["completed"], ended["failed"]) == (images - 2, 2)
    library.check_tags(assets[:-2])
    rows = library.assets()
    assert {rows[asset]["tagging_error"] for asset in assets[-2:]} == {
        "The image's row names a file that does not belong to its workspace."
    }
    assert all(rows[asset]["tags"] is None for asset in assets[-2:])
    # By the provider's own record, nobody asked about it.
    asked = sum(entry.get("status") == 200 for entry in stack.simulator.request_log if "chat" in entry["path"])
    assert asked <= images - 2

    # A retry leaves them out, and says so when there is nothing else.
    with pytest.raises(psycopg.Error) as refused:
        library.rpc("public.retry_tagging", job["job_id"])
    assert "nothing_to_retry" in (refused.value.diag.message_detail or "")


async def test_automatic_mode_shows_them_as_failed(library: Library) -> None:
    stack = library.stack
    stack.configure(upload_quiet="0.1 s", upload_longest="1 s")
    theirs = Library(stack, stack.add_member("theirs"))
    [(secret, _)] = await theirs.upload_files(1)
    library.sql("select autotag.set_automatic(true)")
    asset = row(library, None, secret)
    async with worker(stack):
        await library.finished(*await begun(library, 1))
    shown = library.assets()[asset]
    assert (shown["tagging_stage"], shown["tags"]) == ("failed", None)
    assert "does not belong to its workspace" in shown["tagging_error"]


async def begun(library: Library, jobs: int) -> list[dict[str, Any]]:
    await until(lambda: len(library.sql("select id from autotag.jobs")) == jobs, "the upload to be sealed")
    return [{"job_id": str(found["id"])} for found in library.sql("select id from autotag.jobs")]


# -- what the caller may see


OWN_UPLOADS = """
    drop policy "members read the images of their workspaces" on storage.objects;
    create policy "only what you uploaded" on storage.objects for select to authenticated
      using (owner_id = (select auth.uid())::text)"""


@pytest.fixture
def strict(library: Library) -> Library:
    """A project whose members see only what they uploaded themselves."""
    library.sql(OWN_UPLOADS)
    return library


async def test_a_file_that_the_caller_may_not_see_is_no_file_to_them(strict: Library) -> None:
    stack = strict.stack
    assets = await strict.upload(3)  # by the server: nobody owns them
    strict.sql("update storage.objects set owner_id = %s where name like '%%' || %s",
               strict.member.user, strict.drawings[assets[0]].name)  # fmt: skip
    [missing] = strict.insert(["never-uploaded.jpg"])
    job = strict.enqueue([*assets, missing])
    async with worker(stack):
        [ended] = await strict.finished(job)
        assert (ended["completed"], ended["failed"]) == (1, 3)
        rows = strict.assets()
        strict.check_tags(assets[:1])
        # Hidden and missing look the same.
        assert {(rows[a]["tags"], rows[a]["tagging_error"]) for a in [*assets[1:], missing]} == {
            (None, "The image's file is not in storage.")
        }
        codes = strict.sql("select distinct error_code from autotag.tasks where finished_at is not null")
        assert [code["error_code"] for code in codes] == ["file_missing"]

        # The project's server may tag them: it sees every file.
        [made] = strict.sql("select to_jsonb(public.enqueue_tagging(%s::uuid[])) as job", assets[1:])
        await strict.finished(made["job"])
    strict.check_tags(assets)


@pytest.mark.parametrize("images", [1, 60], ids=["a single call", "a batch"])
async def test_what_was_asked_about_is_the_file_that_is_read(strict: Library, images: int) -> None:
    """A row names the member's own file at enqueue, and a colleague's hidden file when a worker reads it."""
    [hidden] = await strict.upload_files([list(draw(90, 9))[89]])
    assets = await strict.upload(images)
    strict.sql("update storage.objects set owner_id = %s where name <> %s", strict.member.user, hidden[0])
    job = strict.enqueue(assets)
    point_at(strict, assets[:1], hidden[0])
    async with worker(strict.stack):
        [ended] = await strict.finished(job)
    assert (ended["completed"], ended["failed"]) == (images - 1, 1)
    row = strict.assets()[assets[0]]
    assert (row["tags"], row["tagging_error"]) == (None, "The image's file is not in storage.")


async def test_a_retry_asks_again_as_whoever_retries(strict: Library) -> None:
    assets = await strict.upload(2)
    job = strict.enqueue(assets)
    async with worker(strict.stack):
        [ended] = await strict.finished(job)
        assert ended["failed"] == 2
        strict.sql("update storage.objects set owner_id = %s where name like '%%' || %s",
                   strict.member.user, strict.drawings[assets[0]].name)  # fmt: skip
        [again] = await strict.finished(strict.rpc("public.retry_tagging", job["job_id"]))
    assert (again["completed"], again["failed"]) == (1, 1)


async def test_an_image_whose_run_ends_while_it_is_asked_for_again(strict: Library) -> None:
    """The files of images that are being tagged are not checked at enqueue. If their run ends a moment later and they
    are enqueued again, the claim checks them."""
    assets = await strict.upload(2)
    strict.sql("update storage.objects set owner_id = %s where name like '%%' || %s",
               strict.member.user, strict.drawings[assets[0]].name)  # fmt: skip
    [made] = strict.sql("select to_jsonb(public.enqueue_tagging(%s::uuid[])) as job", assets)
    marks = strict.rpc("autotag.visible_file_marks", assets)
    assert marks == [uuid.UUID(int=0)] * 2
    strict.rpc("public.cancel_tagging", made["job"]["job_id"])
    job = strict.rpc("autotag.enqueue", assets, marks)
    async with worker(strict.stack):
        [ended] = await strict.finished(job)
    assert (ended["completed"], ended["failed"]) == (1, 1)
    strict.check_tags(assets[:1])


async def test_files_of_a_public_bucket_are_everybodys_to_see(strict: Library) -> None:
    assets = await strict.upload(2)
    strict.sql("update storage.buckets set public = true where id = 'assets'")
    async with worker(strict.stack):
        [ended] = await strict.finished(strict.enqueue(assets))
    assert ended["completed"] == 2


async def test_without_the_check_they_would_have_them(strict: Library) -> None:
    """Proves that the tests above can fail: without the check of files, both images are tagged."""
    strict.sql(
        "create or replace function autotag.users_see_files() returns boolean language sql immutable as 'select false'"
    )
    assets = await strict.upload(2)
    async with worker(strict.stack):
        [ended] = await strict.finished(strict.enqueue(assets))
    assert ended["completed"] == 2


# -- the doctor


def finding(library: Library) -> dict[str, Any]:
    [told] = library.sql("select autotag.diagnose() -> 'findings' as findings")
    return next(f for f in told["findings"] if f["check"] == "files")


def test_the_doctor_names_the_rule_and_the_rows_that_break_it(library: Library) -> None:
    told = finding(library)
    assert (told["level"], "workspace-folder" in told["message"]) == ("ok", True)
    asset = row(library, None, "flat.jpg")
    told = finding(library)
    assert told["level"] == "warning"
    assert told["message"].startswith("1 of 1 checked rows")
    assert asset in told["message"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("alter table public.assets disable row level security", "row level security is off"),
        ("""create policy "anything goes" on public.assets for insert to authenticated with check (true)""", "anything goes"),
        ("""create policy "all of it" on public.assets to public using (workspace_id is not null)""", "all of it"),
        ("""grant update (storage_path) on public.assets to authenticated;
            create policy "changes" on public.assets for update to authenticated using (true)""", "changes"),
        ("""create policy "changes" on public.assets for update to authenticated using (true)""", ""),
        ("""create policy "server" on public.assets to service_role using (true)""", ""),
    ],
)  # fmt: skip
def test_the_doctor_says_who_could_write_such_rows(library: Library, stack: Stack, change: str, said: str) -> None:
    library.sql(change)
    message = finding(library)["message"]
    assert ("Signed-in users can write rows that name any file" in message) == bool(said), message
    assert said in message


def test_the_doctor_warns_of_the_rule_any(library: Library) -> None:
    library.sql(
        "create or replace function autotag.file_rule() returns text language sql immutable as $$ select 'any' $$"
    )
    assert finding(library)["level"] == "warning"


async def test_buckets_are_files_of_their_own(library: Library) -> None:
    """A row names the same path in an existing bucket that the file rule does not allow."""
    library.sql("insert into storage.buckets (id, name, public) values ('private', 'private', false)")
    [drawing] = draw(1)
    path = f"{library.member.workspace}/x.png"
    await store_file(library.stack.storage(), "private", path, drawing)
    assert "foreign_file" in (refusal(library, library.member.user, row(library, "private", path)) or "")


def test_the_doctor_says_when_the_api_exposes_the_schema(library: Library) -> None:
    def grants() -> dict[str, Any]:
        [told] = library.sql("select autotag.diagnose() -> 'findings' as findings")
        return next(f for f in told["findings"] if f["check"] == "grants")

    with psycopg.connect(library.stack.database_url("supabase_admin"), autocommit=True) as connection:
        name = connection.info.dbname
        for schemas, level in (
            ("public, graphql_public", "ok"),
            ("public,autotag", "error"),
            ("autotag_x, public", "ok"),
            ("autotag", "error"),
        ):
            connection.execute(
                f"alter role authenticator in database \"{name}\" set pgrst.db_schemas = '{schemas}'".encode()
            )
            assert grants()["level"] == level, schemas
        connection.execute(f'alter role authenticator in database "{name}" reset pgrst.db_schemas'.encode())


@pytest.mark.parametrize("moment", ["before it is read", "while it is asked about"])
async def test_an_image_of_another_workspace_by_now_gets_nothing(library: Library, moment: str) -> None:
    """A row is deleted, and another workspace inserts a row with its id. No tags of either picture are stored in the
    wrong row."""
    stack = library.stack
    other = Library(stack, stack.add_member("other"))
    [asset] = await library.upload(1)
    [(theirs, _)] = await other.upload_files(1, seed=5)
    job = library.enqueue([asset])

    def take_over() -> None:
        library.sql("delete from public.assets where id = %s", asset)
        library.sql("insert into public.assets (id, workspace_id, storage_path) values (%s, %s, %s)",
                    asset, other.member.workspace, theirs)  # fmt: skip

    if moment == "before it is read":
        take_over()
    else:
        stack.simulator.plan.latency = (1.0, 1.0)
    async with worker(stack):
        if moment == "while it is asked about":
            await until(lambda: library.sql("select 1 from autotag.tasks where stage = 'processing'") != [], "the call")
            take_over()
        await library.finished(job)
    row = other.assets()[asset]
    assert (row["tags"], row["tagging_result"]) == (None, None)


async def test_a_workers_login_speaks_in_nobodys_name(library: Library) -> None:
    """auth.uid() is null in triggers of the host's table, whatever claims a worker's session has set."""
    library.sql("create table public.seen (who uuid)")
    library.sql("""create function public.note() returns trigger language plpgsql as $$
        begin insert into public.seen values (auth.uid()); return new; end $$""")
    library.sql("create trigger note after update on public.assets for each row execute function public.note()")
    library.sql("grant insert on public.seen to public")
    library.enqueue(library.insert(["a.jpg"]))
    library.sql("delete from public.seen")
    worker_id = "99999999-0000-4000-8000-000000000001"
    with psycopg.connect(library.stack.database_url(WORKER_ROLE), autocommit=True) as login:
        login.execute("select set_config('request.jwt.claims', %s, false)", (json.dumps({"sub": library.member.user}),))
        login.execute("select autotag.register_worker(%s, 'x', autotag.schema_version(), true)", (worker_id,))
        claimed = login.execute("select tasks from autotag.claim(%s, 1, 1)", (worker_id,)).fetchone()
        assert claimed is not None
        row = login.execute("select autotag.describe_tasks(%s, %s)", (worker_id, claimed[0])).fetchone()
        assert row is not None
        task = {key: row[0][0][key] for key in ("task", "attempt")}
        report = {**task, "called": True, "result": {"tags": ["x"], "confidence": {}, "caption": "c", "model": "m"},
                  "usage": {"input": 1, "cached": 0, "output": 1}}  # fmt: skip
        settled = (worker_id, library.member.workspace, json.dumps([report]))
        login.execute("select autotag.settle(%s, %s, %s)", settled)
    assert {seen["who"] for seen in library.sql("select who from public.seen")} == {None}


async def test_an_image_that_moved_while_it_is_tagged_belongs_to_its_new_workspace(library: Library) -> None:
    """The new workspace learns nothing about the image's former upload, and that upload writes nothing to the row."""
    stack = library.stack
    other = Library(stack, stack.add_member("another workspace"))
    moved, stays = library.insert(["a.jpg", "b.jpg"])
    job = library.enqueue_as_server([moved, stays])
    library.sql("update public.assets set workspace_id = %s, storage_path = %s, tagging_stage = null, tagging_error = null"
                " where id = %s", other.member.workspace, f"{other.member.workspace}/a.jpg", moved)  # fmt: skip
    told = other.enqueue_as_server([moved])
    assert told == {"job_id": None, "strategy": None, "image_count": 0, "skipped": 1, "batches": 0, "eta": None}
    library.rpc("public.cancel_tagging", job["job_id"])
    [row] = other.assets().values()
    assert (row["tagging_stage"], row["tagging_error"]) == (None, None)
    assert library.assets()[stays]["tagging_stage"] == "failed"
    assert other.enqueue_as_server([moved])["image_count"] == 1, "it can be tagged there now"
