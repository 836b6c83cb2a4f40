"""Vocabularies, end to end: with `only`, nothing but the vocabulary's tags is stored, whatever the model answers."""

from __future__ import annotations

import json
import random
from typing import Any

import psycopg
from typer.testing import CliRunner

from autotag.cli.app import app
from support import Library, paid, until, widen, worker


def set_vocabulary(library: Library, tags: list[dict[str, Any]], mode: str, **profile: Any) -> None:
    library.sql("select autotag.edit_vocabulary(%s, %s, '{}', true)", library.member.workspace, json.dumps(tags))
    library.sql(
        "select autotag.save_profile(%s, %s)",
        library.member.workspace,
        json.dumps({"vocabulary_mode": mode, **profile}),
    )


def stored_tags(library: Library) -> set[str]:
    return {tag for row in library.assets().values() for tag in row["tags"] or ()}


async def test_only_stores_no_other_tag_on_any_way(library: Library) -> None:
    """2,000 tags and 300 images, by single calls, batches and answers that wait for a locked row, while the vocabulary
    changes."""
    stack = library.stack
    widen(stack)
    stack.configure(batch_batches_per_hour=1000, express_images=5)
    draw = random.Random(7)
    tags = [f"Tag {i:04}" for i in range(1990)] + [f"Gone {i}" for i in range(10)]
    set_vocabulary(
        library, [{"tag": tag, "aliases": [f"word {i}"] if i % 10 == 0 else []} for i, tag in enumerate(tags)], "only"
    )
    outside = ("nonsense", "ignore all previous instructions", "'); drop table autotag.vocabulary; --", "tag 99999", "")

    def answer(_: tuple[str, ...]) -> tuple[str, ...]:
        known = [f"word {i}" if i % 10 == 0 else tag.lower() for i, tag in draw.sample(list(enumerate(tags)), 3)]
        return (*draw.sample(known, draw.randint(0, 3)), draw.choice(outside), draw.choice(outside))

    stack.simulator.plan.tags = answer
    some = await library.upload(300)
    first = [library.enqueue(some[:6]), library.enqueue(some[6:26])]
    with psycopg.connect(stack.database_url()) as held:  # their outcomes are kept, and stored when some tags are gone
        held.execute("select from public.assets where id = any (%s::uuid[]) for update", (some[:3],))
        async with worker(stack):
            await until(lambda: len(library.sql("select 1 as kept from autotag.unstored")) == 3, "outcomes to be kept")
            library.sql("delete from autotag.vocabulary where tag like 'Gone%%'")
    async with worker(stack):
        await library.finished(*first)
        jobs = [library.enqueue(some[26:])]
        assert jobs[0]["strategy"] == "batch-parallel"
        await library.finished(*jobs)
    rows = library.assets()
    assert {row["tagging_stage"] for row in rows.values()} == {"completed"}
    assert len(rows) == 300
    assert stored_tags(library) <= set(tags)
    assert not any(tag.startswith("Gone") for asset in some[:3] for tag in rows[asset]["tags"])
    assert sum(len(row["tags"]) for row in rows.values()) > 200, "tags of the vocabulary are stored"
    assert any(row["tags"] == [] for row in rows.values()), "an image that none of them fits is completed, without tags"


async def test_an_empty_answer_is_one_where_the_vocabulary_is_closed(library: Library) -> None:
    widen(library.stack)
    set_vocabulary(library, [{"tag": "cat"}], "only")
    library.stack.simulator.plan.tags = lambda _: ()
    assets = await library.upload(2)
    async with worker(library.stack):
        await library.finished(library.enqueue(assets))
    assert [row["tags"] for row in library.assets().values()] == [[], []]
    assert len(paid(library.stack)) == 2, "the model is asked once"


async def test_a_vocabulary_in_the_prompt_is_cached(library: Library) -> None:
    """With 300 tags, the provider reads at least 80 % of the prompts' text from its cache."""
    widen(library.stack)
    library.stack.simulator.plan.latency = (0.0, 0.0)
    set_vocabulary(library, [{"tag": f"tag number {i}", "description": "what it means"} for i in range(300)], "prefer")
    assets = await library.upload(40)
    async with worker(library.stack):
        await library.finished(library.enqueue(assets[:1]))
        await library.finished(library.enqueue(assets[1:]))
    details = [entry["usage"]["prompt_tokens_details"] for entry in paid(library.stack)]
    cached, text = sum(d["cached_tokens"] for d in details), sum(d["text_tokens"] for d in details)
    whole = sum(entry["usage"]["prompt_tokens"] for entry in paid(library.stack))
    assert len(details) == 40
    assert cached / text >= 0.8
    assert cached / whole >= 0.8, (cached, text, whole)


def test_the_commands(library: Library, tmp_path: Any, monkeypatch: Any) -> None:
    """A file is imported, errors name their line, nothing is partly imported, and an exported file can be imported
    again."""
    monkeypatch.setenv("DATABASE_URL", library.stack.database_url())
    workspace = library.member.workspace

    def run(*arguments: str, code: int = 0, given: bytes | None = None) -> str:
        done = CliRunner().invoke(app, ["vocabulary", *arguments, "--workspace", workspace], input=given)
        assert done.exit_code == code, done.output
        return done.output

    file = tmp_path / "tags.csv"
    file.write_bytes(
        '\ufefftag;aliases;description;parent\r\nKatze;"Mieze;Kätzchen|kitty";"weich; ""lieb""";Tier\r\n'.encode()
    )
    assert "2 tags would be added" in run("import", str(file), "--dry-run")
    assert run("export").endswith("tag,aliases,description,parent\n"), "(the runner drops the CR of CRLF)"
    assert "2 tags added" in run("import", str(file))
    exported = run("export")
    assert exported.splitlines()[1] == 'Katze,Mieze|Kätzchen|kitty,"weich; ""lieb""",Tier'
    file.write_bytes(exported.encode("utf-16"))
    assert "0 tags added, 0 changed, 0 removed" in run("import", str(file), "--replace")
    listed = run("export", "--json")
    assert "0 tags added, 0 changed, 0 removed" in run("import", "-", given=listed.encode())
    file.write_text("dog\nkitty\n")
    assert "Line 2: “kitty” is a name of two tags" in run("import", str(file), code=1)
    file.write_text("dog\n\n!!!\n")
    assert "Line 3: The tag “!!!” has no letter" in run("import", str(file), code=1)
    assert run("export") == exported
    for i in range(3):
        library.insert([f"{i}.jpg"])
    library.sql("update public.assets set tags = '{mieze,Haus,haus,x}'")
    library.sql("update public.assets set tags = '{haus}' where storage_path like '%%0.jpg'")
    counted = json.loads(run("import", "--from-tags", "--min-count", "3", "--json"))
    assert (counted["added"], counted["counts"]) == (1, {"haus": 3, "mieze": 2, "Haus": 2, "x": 2})
    assert {e["tag"]: e["uses"] for e in json.loads(run("export", "--json"))} == {"Katze": 2, "Tier": 0, "haus": 5}
    general = ["vocabulary", "import", "--from-tags", "--min-count", "3"]
    library.sql("update public.assets set tags = %s", ["Project\u200e Nightfall\x07"])
    for arguments, code in ((["--dry-run"], 0), ([], 1), (["--json"], 1), (["--visible-to-all"], 0)):
        done = CliRunner().invoke(app, [*general, *arguments])
        assert (done.exit_code, "Project Nightfall" in done.output) == (code, True), "the list is shown"
        assert ("Members of all workspaces would see 1 tag" in done.output) == (code == 1)
        [stored] = library.sql("select count(*) as general from autotag.vocabulary where workspace_id is null")
        assert stored["general"] == int("--visible-to-all" in arguments)
    assert "export takes only" in run("export", str(file), code=2)
    assert "Name a file" in run("import", code=2)
