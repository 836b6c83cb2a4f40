"""Members may write values of many megabytes into rows. Only their own images fail because of that."""

from __future__ import annotations

import uuid
from typing import Any

import psycopg
import pytest

from lab.stack import WORKER_ROLE
from support import Library, connected, until, worker

WORKER = "00000000-0000-4000-8000-00000000000a"
MEGABYTES = 20
#: Column, and the longest value that is accepted in it.
LONGEST = {"image_url": 8192, "storage_path": 1024, "storage_bucket": 100}


def drop_index(library: Library) -> None:
    """Drops the index on files, which refuses large values. Only the stand-alone tables have it, other projects do
    not."""
    with psycopg.connect(library.stack.database_url(), autocommit=True) as owner:
        owner.execute("drop index public.assets_file_idx")


def row(library: Library, **columns: str | None) -> str:
    """Inserts a row of the workspace. The database makes its values, so that no test sends megabytes."""
    columns = {"storage_path": f"{library.member.workspace}/{uuid.uuid4()}.jpg", **columns}
    [made] = library.sql(
        f"insert into public.assets (workspace_id, {', '.join(columns)}) values (%s{', %s' * len(columns)})"
        " returning id::text", library.member.workspace, *columns.values(),
    )  # fmt: skip
    return str(made["id"])


def grow(library: Library, asset: str, column: str) -> None:
    library.sql(
        f"update public.assets set {column} = {column} || repeat('a', %s) where id = %s", MEGABYTES * 10**6, asset
    )


def claim(library: Library, slots: int = 256) -> list[dict[str, Any]]:
    """Registers a worker and claims. A claim that read a large value would exceed the timeout."""
    with connected(library.stack.database_url(WORKER_ROLE)) as login:
        login.execute("set statement_timeout = '2s'")
        login.execute("select autotag.register_worker(%s, 'h', autotag.schema_version(), true)", (WORKER,))
        library.stack.prove()
        claimed = login.execute("select tasks from autotag.claim(%s, %s, 1)", (WORKER, slots)).fetchone()
        assert claimed
        found = login.execute("select autotag.describe_tasks(%s, %s)", (WORKER, claimed[0])).fetchone()
        assert found
        tasks: list[dict[str, Any]] = found[0]
        return tasks


def refusal(library: Library, asset: str) -> str:
    with pytest.raises(psycopg.Error) as caught:
        library.enqueue([asset])
    return f"{caught.value.sqlstate} {caught.value.diag.message_detail}"


@pytest.mark.parametrize("column", LONGEST)
def test_a_location_that_is_too_long_is_not_enqueued(library: Library, column: str) -> None:
    library.allow_bucket("b" * LONGEST["storage_bucket"])
    own = f"{library.member.workspace}/"
    begins = {"image_url": "https://example.com/", "storage_path": own, "storage_bucket": "b"}[column]
    longest = begins.ljust(LONGEST[column], "b")
    assert library.enqueue([row(library, **{column: longest})])["image_count"] == 1
    for text in (longest + "b", longest[:-1] + "é"):
        told = refusal(library, row(library, **{column: text}))
        assert "location_too_long" in told, "the limit counts bytes"
        assert told.startswith("PT400")


@pytest.mark.parametrize("column", LONGEST)
def test_a_row_that_grew_after_the_upload_harms_nobody_else(library: Library, column: str) -> None:
    """The claim neither reads the large value nor returns it to the worker."""
    drop_index(library)
    neighbour = Library(library.stack, library.stack.add_member())
    value = {"image_url": "https://example.com/", "storage_bucket": "assets"}.get(column)
    grown = row(library, **({column: value} if value else {}))
    library.enqueue_as_server([grown])
    grow(library, grown, column)
    other = neighbour.insert(["a.jpg"])
    neighbour.enqueue_as_server(other)
    found = {task["asset_id"]: task for task in claim(library)}
    assert set(found) == {grown, *other}
    assert (found[grown]["refused"], found[grown]["url"], found[grown]["path"]) == ("location_too_long", None, None)
    assert found[other[0]]["refused"] is None


def test_no_function_of_the_adapter_reads_a_value_that_is_too_long(library: Library) -> None:
    drop_index(library)
    assets = [row(library, image_url="https://example.com/"), row(library), row(library, storage_bucket="assets")]
    for asset, column in zip(assets, LONGEST, strict=True):
        grow(library, asset, column)
    with psycopg.connect(library.stack.database_url(), autocommit=True) as owner:
        owner.execute("set statement_timeout = '1s'")
        told = owner.execute(
            "select refused, bucket, path, url from autotag.describe_assets(%s::uuid[])", (assets,)
        ).fetchall()
        assert told == [("location_too_long", None, None, None)] * 3
        owner.execute("select * from autotag.check_files(1000)")


async def test_a_large_value_fails_its_image_with_a_sentence(library: Library) -> None:
    """In automatic mode, enqueue_tagging cannot refuse a URL that is too long. The image fails with a sentence, and the
    others are tagged."""
    library.stack.configure(upload_quiet="0.1 s")
    library.sql("select autotag.set_automatic(true)")
    files = await library.upload_files(2)
    good = library.insert([path for path, _ in files])
    bad = row(library, image_url="https://example.com/" + "a" * 9000)
    async with worker(library.stack):
        await until(
            lambda: {a["tagging_stage"] for a in library.assets().values()} <= {"completed", "failed"},
            "the upload's end",
        )
    rows = library.assets()
    assert rows[bad]["tagging_error"] == "The URL, path or bucket name of the image is too long."
    assert {rows[asset]["tagging_stage"] for asset in good} == {"completed"}


def test_a_comparison_leaves_out_tags_that_autotag_never_stored(library: Library) -> None:
    small, large, wordy = (row(library) for _ in range(3))
    library.sql(
        "update public.assets set tags = '{a}', tagging_result = '{}' where workspace_id = %s", library.member.workspace
    )
    words = "(select string_agg(md5(i::text), ' ') from generate_series(1, 2000) i)"
    library.sql(f"update public.assets set tags = array[{words}] where id = %s", large)
    library.sql(
        f"update public.assets set tagging_result = jsonb_build_object('caption', {words}) where id = %s", wordy
    )
    [told] = library.sql("select autotag.comparison_sample(%s, 1000000) as sample", library.member.workspace)
    assert [image["asset_id"] for image in told["sample"]] == [small]
