"""Projects as people have them: init's findings about their schemas, who may then tag, and the tags of the rows.

`schemas/cases.toml` is the table. Each case has a database, and everything happens in SQL: a worker would add nothing to it.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql

from autotag.install.adapter import FUNCTION, TEMPLATE, render
from autotag.install.described import describe
from autotag.install.facts import read_facts
from autotag.install.files import users_see_files
from autotag.install.host import Choices, FileRule, Host, HostError, Members
from autotag.install.migrations import apply_migrations
from autotag.install.preview import show_examples
from autotag.install.quoting import quote, table_name
from autotag.install.survey import refuse_to_ask, survey
from conftest import BARE_TEMPLATE, copied_database
from lab.postgres import LocalPostgres

FOLDER = Path(__file__).parent / "schemas"
TABLE: dict[str, list[dict[str, Any]]] = tomllib.loads((FOLDER / "cases.toml").read_text())
CASES, GUESSES = TABLE["case"], TABLE["guess"]
IDS = {
    f"{letter}{n}": f"00000000-0000-4000-8000-0000000{code}{n}"
    for letter, code in (("w", "000a"), ("u", "000b"), ("i", "000c"), ("o", "000d"))
    for n in range(1, 8)
} | {"long": "x" * 1025}


def fill(value: Any) -> Any:
    """Replaces {w1} and the like by uuids."""
    if isinstance(value, str):
        for name, key in IDS.items():
            value = value.replace(f"{{{name}}}", key)
        return value
    if isinstance(value, list):
        return [fill(one) for one in value]
    return {fill(name): fill(one) for name, one in value.items()} if isinstance(value, dict) else value


@pytest.fixture(params=CASES, ids=lambda case: case["name"])
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = fill(request.param)
    return found


@pytest.fixture
def url(postgres: LocalPostgres, bare: str, case: dict[str, Any]) -> str:
    """A project with the case's schema, two users and a bucket."""
    with psycopg.connect(postgres.url(database=bare), autocommit=True) as owner:
        owner.execute("insert into auth.users (id) values (%s), (%s)", (IDS["u1"], IDS["u2"]))
        owner.execute("insert into storage.buckets (id, name) values ('library', 'library')")
        # most schemas leave out row level security; without these privileges it makes no difference
        owner.execute(
            "alter default privileges in schema public revoke insert, update on tables from anon, authenticated"
        )
        owner.execute(fill((FOLDER / f"{case['schema']}.sql").read_text()).encode())
    return postgres.url(database=bare)


def test_a_schema(case: dict[str, Any], url: str) -> None:
    choices = Choices(**case.get("options", {}))
    if "says" in case:
        with pytest.raises(HostError) as told:
            show_examples(url, survey(url, choices, refuse_to_ask, may_ask=False))
        assert [text for text in case["says"] if text not in str(told.value)] == [], str(told.value)
        assert len(str(told.value).splitlines()) == 1
        return
    found = survey(url, choices, refuse_to_ask, may_ask=False)
    host = found.host
    told_host = describe(host, found.facts)
    assert {name: told_host.get(name) for name in case.get("host", {})} == case.get("host", {})
    own, skipped = [
        [IDS.get(name, name) for name in case.get(key, default)] for key, default in (("own", ["i1"]), ("skipped", []))
    ]
    check_examples(url, show_examples(url, found), own)
    apply_migrations(url, host=host)
    with psycopg.connect(url, autocommit=True) as owner:
        owner.execute(case.get("change", "select").encode())
        places = {place["id"]: place["place"] for place in described(owner, [*own, *skipped])}
        wanted = {IDS.get(name, name): place for name, place in case.get("places", {}).items()}
        assert {key: places[key] for key in wanted} == wanted
        if "change" not in case or not any(place.startswith("refused") for place in wanted.values()):
            check_callers(owner, host, case, own, skipped)


def test_a_project_that_gives_everything_to_everybody_gives_nothing_of_autotag(
    postgres: LocalPostgres, bare: str
) -> None:
    """The project has default privileges for anon in all schemas."""
    with psycopg.connect(postgres.url("supabase_admin", bare), autocommit=True) as owner:
        for what in ("usage on schemas", "all on sequences", "all on tables", "all on functions"):
            for role in ("postgres", "supabase_admin"):
                owner.execute(f"alter default privileges for role {role} grant {what} to anon".encode())
        apply_migrations(postgres.url("supabase_admin", bare), with_host_baseline=True)
        assert owner.execute("select has_schema_privilege('anon', 'autotag', 'usage')").fetchone() == (False,)
        assert owner.execute(
            "select c.relname from pg_class c where c.relnamespace = 'autotag'::regnamespace and case c.relkind"
            " when 'S' then has_sequence_privilege('anon', c.oid, 'usage, select, update')"
            " when 'r' then has_table_privilege('anon', c.oid, 'select, insert, update, delete, truncate') end"
        ).fetchall() == []  # fmt: skip


def check_examples(url: str, examples: list[dict[str, Any]] | None, own: list[str]) -> None:
    """Checks that init shows real rows, and leaves nothing behind."""
    assert examples
    assert len(examples) <= 3
    assert own[0] in [example["id"] for example in examples]
    with psycopg.connect(url) as owner:
        assert owner.execute("select to_regnamespace('autotag')").fetchone() == (None,)


def described(owner: psycopg.Connection[Any], assets: list[str]) -> list[dict[str, Any]]:
    rows = owner.execute(
        sql.SQL("select asset_id::text, refused, bucket, path, url from autotag.describe_assets({}) d").format(
            listed(assets)
        )
    ).fetchall()
    return [
        {"id": key, "place": f"refused: {refused}" if refused else f"{bucket}/{path}" if path else link or ""}
        for key, refused, bucket, path, link in rows
    ]


def listed(assets: list[str]) -> sql.Composable:
    """The ids as the argument of a function, whatever their type is."""
    return sql.Literal("{" + ",".join(json.dumps(asset) for asset in assets) + "}")


def call(owner: psycopg.Connection[Any], claims: dict[str, Any] | None, statement: sql.Composable) -> Any:
    """Executes a statement with this caller's token. Returns its result, or the sqlstate of a refusal."""
    try:
        with owner.transaction():
            if claims is not None:
                token = json.dumps({"role": "authenticated", **claims})
                owner.execute("select set_config('request.jwt.claims', %s, true)", (token,))
                owner.execute("set local role authenticated")
            row = owner.execute(statement).fetchone()
            return row and row[0]
    except psycopg.Error as error:
        return error.sqlstate


def check_callers(
    owner: psycopg.Connection[Any], host: Host, case: dict[str, Any], own: list[str], skipped: list[str]
) -> None:
    """Checks that a stranger and another login get nothing, and that a member gets the right tags in the right rows."""
    before = untagged(owner, host, own[0])
    assert (set(own) - before, before & set(skipped)) == (set(), set()), "null and empty lists are no tags"
    enqueue = sql.SQL("select to_jsonb(public.enqueue_tagging({}))").format(listed([*own, *skipped]))
    assert call(owner, case.get("stranger", {"sub": IDS["u2"]}), enqueue) == "PT404"
    assert call(owner, case.get("other", {"sub": "user_2abc"}), enqueue) == case.get("refused", "PT403")
    member = case.get("member", {"sub": IDS["u1"]})
    reply = call(owner, member, enqueue)
    assert isinstance(reply, dict), reply
    assert (reply["image_count"], reply["skipped"]) == (len(own), len(skipped))
    describe = sql.SQL("select to_jsonb(public.tagging_job({}))").format(sql.Literal(reply["job_id"]))
    assert call(owner, member, describe)["stages"]
    [(user, who)] = owner.execute("select user_id::text, autotag.caller()::text from autotag.jobs").fetchall()
    assert (user, who) == (member.get("sub"), None)

    for asset in own:  # as a worker would
        result = json.dumps({"tags": [f"tag of {asset}"], "confidence": {}, "caption": "c", "model": "m"})
        owner.execute(
            sql.SQL(
                "select autotag.store_tags(array[d.asset_id], d.workspace_id, array[{}::jsonb], array[d.mark])"
                " from autotag.describe_assets({}) d"
            ).format(sql.Literal(result), listed([asset]))
        )
    tags, table = quote(case.get("tags", "tags")), table_name(host.table)
    rows = owner.execute(f"select a.{quote(host.id)}::text, to_jsonb(a.{tags}) from {table} a".encode()).fetchall()
    assert {key: [f"tag of {key}"] for key in own} == {key: found for key, found in rows if found}
    assert untagged(owner, host, own[0]) & {*own, *skipped} == set()


def untagged(owner: psycopg.Connection[Any], host: Host, asset: str) -> set[str]:
    """The images that `autotag enqueue` would tag in the workspace of this image."""
    row = owner.execute(
        f"select autotag.list_assets(a.{quote(host.workspace)}, true, null, 100)::text[] from {table_name(host.table)} a"
        f" where a.{quote(host.id)}::text = '{asset}'".encode()
    ).fetchone()
    assert row
    return set(row[0])


LONG = {"name": "long ids", "schema": "clerk", "options": {"caller_claim": "sub", "members_claim": "org_id"}}


@pytest.mark.parametrize("case", [LONG], ids=["long ids"])
def test_a_workspace_whose_id_is_longer_than_an_index_takes_is_refused(url: str, case: dict[str, Any]) -> None:
    apply_migrations(url, host=survey(url, Choices(**case["options"]), refuse_to_ask, may_ask=False).host)
    with psycopg.connect(url, autocommit=True) as owner:
        for claims in (None, {"sub": "user_1", "org_id": IDS["long"]}):
            for call_ in (
                "tagging_profile({})",
                "set_tagging_profile({}, '{{}}')",
                "edit_tagging_vocabulary({}, '[]')",
            ):
                statement = sql.SQL("select public." + call_).format(sql.Literal(IDS["long"]))
                assert call(owner, claims, statement) == "PT400", call_


BIN = {
    "name": "the bin",
    "schema": "soft_delete",
    "options": {"where": "deleted_at is null and mime_type like 'image/%'"},
}


@pytest.mark.parametrize("case", [fill(BIN)], ids=["the bin"])
def test_rows_in_the_bin_and_unknown_logins_in_automatic_mode(url: str, case: dict[str, Any]) -> None:
    """The project's own insert succeeds with any token, and a row that is moved to the bin later is not sent."""
    apply_migrations(url, host=survey(url, Choices(**case["options"]), refuse_to_ask, may_ask=False).host)
    with psycopg.connect(url, autocommit=True) as owner:
        owner.execute("select autotag.set_automatic(true)")
        with owner.transaction():
            owner.execute(
                """select set_config('request.jwt.claims', '{"sub": "auth0|123", "role": "authenticated"}', true)"""
            )
            rows: tuple[LiteralString, tuple[str, ...]] = (
                "insert into public.assets select i, %s, %s::text || '/x.jpg', 'image/jpeg', d from (values"
                " (%s::uuid, null), (%s, now())) v (i, d)",
                (IDS["w1"], IDS["w1"], IDS["i6"], IDS["i7"]),
            )
            owner.execute(*rows)
        assert owner.execute("select count(*) from autotag.arrivals").fetchone() == (0,), "nobody's upload"
        owner.execute("delete from public.assets where id = any (%s::uuid[])", ([IDS["i6"], IDS["i7"]],))
        with owner.transaction():
            owner.execute("""select set_config('request.jwt.claims', '{"role": "service_role"}', true)""")
            owner.execute(*rows)
        arrived = owner.execute("select asset_id::text, uploader::text from autotag.arrivals order by 1").fetchall()
        nobody = "00000000-0000-0000-0000-000000000000"
        assert arrived == [(IDS["i6"], nobody), (IDS["i7"], nobody)]
        made = owner.execute(
            "select autotag.start_upload(%s, null, %s::uuid[])", (IDS["w1"], [IDS["i6"], IDS["i7"]])
        ).fetchone()
        assert made == (1,)
        assert owner.execute("select asset_id::text from autotag.tasks").fetchall() == [(IDS["i6"],)]
        owner.execute("update public.assets set deleted_at = now() where id = %s", (IDS["i6"],))
        located = owner.execute(
            "select l.path, l.refused from autotag.locate(%s::uuid[], %s::uuid[], %s::uuid[], %s::uuid[]) l",
            ([IDS["i6"]], [IDS["w1"]], [None], [None]),
        ).fetchall()
        assert located == [(None, "filtered")]


NUMBERS = """
    create table public.organization_members (org_id uuid, user_id bigint, primary key (org_id, user_id));
    insert into public.organization_members values ('{w1}', 7);
    create table public.assets (id uuid primary key, org_id uuid, image_url text);"""


def test_a_caller_whose_claim_is_of_another_type_is_nobody(postgres: LocalPostgres, bare: str) -> None:
    """If the token's claim has another type, the caller is null and not a member, and no error is raised."""
    url = postgres.url(database=bare)
    with psycopg.connect(url, autocommit=True) as owner:
        owner.execute(fill(NUMBERS).encode())
        host = survey(
            url, Choices(caller_claim="app.uid", members_table="organization_members"), refuse_to_ask, may_ask=False
        ).host
        with owner.transaction():
            owner.execute(render(TEMPLATE.read_text(), host).encode())
        for uid, expected in ((7, (7, True)), ("7", (7, True)), (8, (8, False)), ("", (None, False)), ("auth0|7", (None, False)),
                              ("9" * 30, (None, False)), ([7], (None, False)), ({"id": 7}, (None, False)), (None, (None, False))):  # fmt: skip
            with owner.transaction():
                owner.execute("select set_config('request.jwt.claims', %s, true)", (json.dumps({"app": {"uid": uid}}),))
                told = owner.execute("select autotag.caller(), autotag.is_member(%s)", (IDS["w1"],)).fetchone()
                assert told == expected, uid


@pytest.fixture(scope="module")
def shared(postgres: LocalPostgres) -> Iterator[tuple[psycopg.Connection[Any], str]]:
    """One database for all guesses: none of them installs anything."""
    with (
        copied_database(postgres, BARE_TEMPLATE) as name,
        psycopg.connect(postgres.url(database=name), autocommit=True) as owner,
    ):
        owner.execute("insert into auth.users (id) values (%s), (%s)", (IDS["u1"], IDS["u2"]))
        owner.execute("insert into storage.buckets (id, name) values ('library', 'library')")
        yield owner, postgres.url(database=name)


@pytest.mark.parametrize("guess", [fill(one) for one in GUESSES], ids=[one["name"] for one in GUESSES])
def test_what_is_certain(shared: tuple[psycopg.Connection[Any], str], guess: dict[str, Any]) -> None:
    """init does not guess anything that decides who may see, do or lose something."""
    owner, url = shared
    for (name,) in owner.execute(
        "select polname from pg_policy where polrelid = 'storage.objects'::regclass"
    ).fetchall():
        owner.execute(sql.SQL("drop policy {} on storage.objects").format(sql.Identifier(name)))
    owner.execute("drop schema if exists hidden cascade; drop schema public cascade; create schema public")
    owner.execute((fill((FOLDER / "guess.sql").read_text()) + guess["sql"]).encode())
    choices = Choices(**guess.get("options", {}))
    if "members" in guess:
        found = survey(url, choices, refuse_to_ask, may_ask=False)
        rule = guess.get("rule", "workspace-folder")
        assert (str(found.host.members), found.host.files.name) == (guess["members"], rule)
        assert [text for text in guess.get("notes", []) if not any(text in note for note in found.notes)] == [], (
            found.notes
        )
        assert len(found.notes) == len(guess.get("notes", []))
        assert bool(show_examples(url, found)) is not guess.get("empty", False)
        return
    with pytest.raises(HostError) as told:
        show_examples(url, survey(url, choices, refuse_to_ask, may_ask=False))
    assert [text for text in guess["says"] if text not in str(told.value)] == [], str(told.value)
    assert len(str(told.value).splitlines()) == 1
    if "create table public.victim" in guess["sql"]:
        assert owner.execute("select count(*) from public.victim").fetchone() == (0,)


def test_the_check_of_files_is_off_only_where_no_policy_can_apply(shared: tuple[psycopg.Connection[Any], str]) -> None:
    """The caller must be able to see a file in Storage, unless users certainly see no file of its bucket."""
    owner, url = shared
    told = {}
    for policy in TABLE["policy"]:
        owner.execute(
            f"create policy one on storage.objects for select to authenticated using ({policy['using']})".encode()
        )
        told[policy["using"]] = users_see_files(read_facts(url), FileRule(buckets=("library",)))
        owner.execute("drop policy one on storage.objects")
    assert told == {policy["using"]: policy["applies"] for policy in TABLE["policy"]}


#: A value of the claim -> the forms of a policy that accept it for the workspace w1.
CLAIMS = [
    ("w1", {"text", "keys", ""}), (["w1", "w2"], {"list", "keys", ""}), ({"w1": "former"}, {"keys", ""}), (["w2"], set()),
    ({"w2": "w1"}, set()), ("w1x", set()), (None, set()), ([["w1"]], set()),
]  # fmt: skip


@pytest.mark.parametrize("form", ["text", "list", "keys", ""])
def test_a_claim_counts_as_the_policies_read_it(shared: tuple[psycopg.Connection[Any], str], form: str) -> None:
    owner, _ = shared
    host = Host(workspace_type="text", members=Members(claim=("org",), claim_form=form))
    adapter = render(TEMPLATE.read_text(), host)
    assert (f'"claim_form": "{form}"' in adapter) is bool(form), "a later init keeps it"
    body = next(f["body"] for f in FUNCTION.finditer(adapter) if f["name"] == "is_member")
    body = body.replace("p_workspace_id", "'w1'")
    for caller, (value, forms) in product(("'u1'", "null"), CLAIMS):
        with owner.transaction():
            owner.execute("select set_config('request.jwt.claims', %s, true)", (json.dumps({"org": value}),))
            answer = owner.execute(body.replace("autotag.caller()", caller).encode()).fetchone()
        assert answer == (form in forms and caller != "null",), (value, caller)


def test_an_object_is_not_the_lack_of_tags(shared: tuple[psycopg.Connection[Any], str]) -> None:
    """Nothing can be merged into a JSON object. If it counted as untagged, `autotag enqueue` would pay for its image at
    each call."""
    owner, _ = shared
    code = re.search(r"not p_untagged or (.*)\)\n", render(TEMPLATE.read_text(), Host(tags_type="jsonb")))
    assert code
    values = {None: True, "[]": True, "null": True, "{}": False, '{"env": 1}': False, '["cat"]': False}
    rows = owner.execute(
        f"select a.t, {code[1]} from (select t, t::jsonb as tags, null::jsonb as tagging_result from unnest(%s::text[]) t) a".encode(),
        (list(values),),
    ).fetchall()
    assert dict(rows) == values


@pytest.mark.parametrize(("condition", "form"), [
    ("workspace_id::text = auth.jwt() ->> 'org'", "text"), ("(auth.jwt() -> 'org') ? workspace_id::text", "keys"),
    ("workspace_id::text in (select jsonb_array_elements_text(auth.jwt() -> 'org'))", "list"),
])  # fmt: skip
def test_the_form_of_a_claim_is_the_policies(
    shared: tuple[psycopg.Connection[Any], str], condition: str, form: str
) -> None:
    """This also applies to a claim from an option, and to one that the adapter remembers."""
    owner, url = shared
    owner.execute("drop schema if exists hidden cascade; drop schema public cascade; create schema public")
    owner.execute(fill((FOLDER / "guess.sql").read_text()).encode())
    owner.execute(
        "alter table public.assets enable row level security; create policy p on public.assets for select to"
        f" authenticated using ({condition})".encode()
    )
    found, named, other, told = (
        survey(url, choices, refuse_to_ask, may_ask=False).host.members.claim_form
        for choices in (Choices(), Choices(members_claim="org"), Choices(members_claim="orgs"),
                        Choices(members_claim="orgs", claim_form=form))
    )  # fmt: skip
    assert (found, named, other, told) == (form, form, "", form)


@pytest.mark.parametrize(
    ("condition", "form"),
    [
        ("coalesce(auth.jwt() ->> 'org', auth.jwt() -> 'o' ->> 'id') = workspace_id::text", "text"),
        ("coalesce(auth.jwt() ->> 'org', auth.jwt() -> 'org' ->> 0) = workspace_id::text", ""),
        ("workspace_id::text = auth.jwt() ->> 'orgs'", ""),
    ],
)
def test_a_claim_inside_another_expression_has_the_form_of_its_use(
    shared: tuple[psycopg.Connection[Any], str], condition: str, form: str
) -> None:
    """Clerk's pattern: a token with an array in that claim names no workspace, as in the policy."""
    owner, url = shared
    owner.execute("drop schema if exists hidden cascade; drop schema public cascade; create schema public")
    owner.execute(fill((FOLDER / "guess.sql").read_text()).encode())
    owner.execute(
        "alter table public.assets enable row level security; create policy p on public.assets for select to"
        f" authenticated using ({condition})".encode()
    )
    assert survey(url, Choices(members_claim="org"), refuse_to_ask, may_ask=False).host.members.claim_form == form


def test_each_schema_has_a_case() -> None:
    assert {path.stem for path in FOLDER.glob("*.sql")} == {case["schema"] for case in CASES} | {"guess"}
    for cases in (CASES, GUESSES):
        assert len({case["name"] for case in cases}) == len(cases)
