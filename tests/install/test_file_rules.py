"""`autotag init` finds out which files a workspace's rows may name, and the adapter enforces that."""

from __future__ import annotations

import itertools
import uuid
from dataclasses import dataclass, replace

import psycopg
import pytest
from psycopg.rows import dict_row

from autotag.install.adapter import TEMPLATE, file_code, render
from autotag.install.answers import HostError
from autotag.install.facts import read_facts
from autotag.install.files import find_rule, users_see_files
from autotag.install.host import Choices, FileRule, Host, Members, propose
from autotag.install.migrations import apply_migrations
from autotag.install.survey import refuse_to_ask, survey
from lab.postgres import LocalPostgres

W1, W2, U1, U2 = (str(uuid.uuid4()) for _ in range(4))
IDS = {"w1": W1, "w2": W2, "u1": U1, "u2": U2}
PLAIN = """
    create table public.workspaces (id uuid primary key);
    create table public.workspace_members (
      workspace_id uuid references public.workspaces, user_id uuid references auth.users, primary key (workspace_id, user_id));
    insert into auth.users (id) values ('{u1}'), ('{u2}');
    insert into public.workspaces values ('{w1}'), ('{w2}');
    insert into public.workspace_members values ('{w1}', '{u1}'), ('{w2}', '{u2}');
    create table public.assets (id uuid primary key default gen_random_uuid(), workspace_id uuid not null, storage_path text);
    insert into storage.buckets (id, name, public) values ('library', 'library', false);"""
UPLOADERS = PLAIN.replace("storage_path text", "storage_path text, uploaded_by uuid")
BUCKETS = (
    PLAIN.replace("storage_path text", "bucket text, storage_path text")
    + """
    insert into storage.buckets (id, name, public) values ('{w1}', '{w1}', false), ('{w2}', '{w2}', false), ('b', 'b', false);"""
)
CLAIMS = """
    create table public.assets (id uuid primary key default gen_random_uuid(), workspace_id uuid not null, storage_path text);
    alter table public.assets enable row level security;
    create policy "own tenant" on public.assets to authenticated
      using (workspace_id = ((select auth.jwt()) -> 'app_metadata' ->> 'workspace_id')::uuid);
    insert into storage.buckets (id, name, public) values ('library', 'library', false);"""
PERSONAL = """
    create table public.profiles (user_id uuid);
    create table public.assets (id uuid primary key default gen_random_uuid(), account_id uuid not null, storage_path text);
    create table public.account_members (account_id uuid, user_id uuid);
    insert into storage.buckets (id, name, public) values ('library', 'library', false);"""
OBJECTS = """
    insert into storage.objects (bucket_id, name, owner, owner_id) values
      ('library', 'a.jpg', '{u1}', '{u1}'), ('library', 'b.jpg', '{u2}', '{u2}'), ('library', 'c.jpg', null, null);"""
FOLDER_OF_TENANT = """
    create policy p on storage.objects for select to authenticated using (bucket_id = 'library' and
      (storage.foldername(name))[1] in (select m.workspace_id::text from public.workspace_members m where m.user_id = auth.uid()));"""
FOLDER_OF_USER = """
    create policy p on storage.objects for all to authenticated using ((storage.foldername(name))[1] = (select auth.uid())::text);"""
OWNER = "create policy p on storage.objects for select to authenticated using (owner_id = (select auth.uid())::text);"
FOLDERNAME = """
    create function storage.foldername(name text) returns text[] language sql immutable as
    $$ select (string_to_array(name, '/'))[1:cardinality(string_to_array(name, '/')) - 1] $$;"""


@dataclass(frozen=True)
class Case:
    """A project, the rule that init finds, and rows of the first workspace that may be tagged or not."""

    schema: str
    rows: list[dict[str, str]]
    rule: str
    own: list[dict[str, str]]
    foreign: list[dict[str, str]]
    wanted: str | None = None


CASES = {
    "the folder of the workspace": Case(
        PLAIN, [{"storage_path": "{w1}/a.jpg"}], "workspace-folder: <workspace>/… in library",
        [{"storage_path": "{w1}/x/b.jpg"}], [{"storage_path": "{w2}/b.jpg"}, {"storage_path": "b.jpg"}],
    ),
    "below a word": Case(
        PLAIN, [{"storage_path": "images/{w1}/a.jpg"}, {"storage_path": "images/{w1}/b.jpg"}],
        "workspace-folder: images/<workspace>/… in library", [{"storage_path": "images/{w1}/c.jpg"}],
        [{"storage_path": "images/{w2}/c.jpg"}, {"storage_path": "{w1}/c.jpg"}, {"storage_path": "other/{w1}/c.jpg"}],
    ),
    "below different folders": Case(
        PLAIN, [{"storage_path": "raw/{w1}/a.jpg"}, {"storage_path": "small/{w1}/b.jpg"}],
        "workspace-folder: */<workspace>/… in library", [{"storage_path": "large/{w1}/c.jpg"}],
        [{"storage_path": "raw/{w2}/c.jpg"}, {"storage_path": "{w1}/raw/c.jpg"}],
    ),
    "nothing there yet": Case(
        PLAIN, [], "workspace-folder: <workspace>/… in library", [{"storage_path": "{w1}/a.jpg"}], [{"storage_path": "a.jpg"}],
    ),
    "nothing there yet, but a policy": Case(
        PLAIN + FOLDERNAME + FOLDER_OF_USER, [], "uploader-folder: <member>/… in library",
        [{"storage_path": "{u1}/a.jpg"}], [{"storage_path": "{u2}/a.jpg"}, {"storage_path": "{w1}/a.jpg"}],
    ),
    "a policy of the tenant's folder": Case(
        PLAIN + FOLDERNAME + FOLDER_OF_TENANT, [], "workspace-folder: <workspace>/… in library",
        [{"storage_path": "{w1}/a.jpg"}], [{"storage_path": "{u1}/a.jpg"}],
    ),
    "folders of members": Case(
        PLAIN, [{"storage_path": "{u1}/a.jpg"}], "uploader-folder: <member>/… in library",
        [{"storage_path": "{u1}/b.jpg"}], [{"storage_path": "{u2}/b.jpg"}, {"storage_path": "{w1}/b.jpg"}],
    ),
    "folders of uploaders": Case(
        UPLOADERS, [{"storage_path": "u/{u1}/a.jpg", "uploaded_by": "{u1}"}], "uploader-folder: u/<uploaded_by>/… in library",
        [{"storage_path": "u/{u1}/b.jpg", "uploaded_by": "{u1}"}],
        # the last one says that a member of another workspace uploaded it, into their folder
        [{"storage_path": "u/{u2}/b.jpg", "uploaded_by": "{u1}"}, {"storage_path": "u/{u1}/b.jpg"},
         {"storage_path": "u/{u2}/b.jpg", "uploaded_by": "{u2}"}],
    ),
    "owners of objects": Case(
        PLAIN + OBJECTS, [{"storage_path": "a.jpg"}], "owner in library", [{"storage_path": "a.jpg"}],
        [{"storage_path": "b.jpg"}, {"storage_path": "c.jpg"}, {"storage_path": "none.jpg"}],
    ),
    "owners by a policy": Case(
        UPLOADERS + OBJECTS + OWNER, [], "owner in library", [{"storage_path": "a.jpg", "uploaded_by": "{u1}"}],
        [{"storage_path": "b.jpg", "uploaded_by": "{u1}"}, {"storage_path": "b.jpg", "uploaded_by": "{u2}"}],
    ),
    "a bucket each": Case(
        BUCKETS, [{"bucket": "{w1}", "storage_path": "a.jpg"}], "workspace-bucket", [{"bucket": "{w1}", "storage_path": "b.jpg"}],
        [{"bucket": "{w2}", "storage_path": "b.jpg"}, {"bucket": "library", "storage_path": "{w1}/b.jpg"}],
    ),
    "buckets that rows name": Case(
        BUCKETS, [{"bucket": "library", "storage_path": "{w1}/a.jpg"}, {"bucket": "b", "storage_path": "{w1}/a.jpg"}],
        "workspace-folder: <workspace>/… in b, library", [{"bucket": "b", "storage_path": "{w1}/b.jpg"}],
        [{"bucket": "{w2}", "storage_path": "{w1}/b.jpg"}, {"bucket": "b", "storage_path": "{w2}/b.jpg"}],
    ),
    "members by a claim": Case(
        CLAIMS, [{"storage_path": "{w1}/a.jpg"}], "workspace-folder: <workspace>/… in library",
        [{"storage_path": "{w1}/b.jpg"}], [{"storage_path": "{w2}/b.jpg"}],
    ),
    "anything, said explicitly": Case(
        PLAIN, [{"storage_path": "a.jpg"}], "any", [{"storage_path": "{w2}/b.jpg"}], [{"storage_path": "{w1}/../b.jpg"}], "any",
    ),
    "a function of the project": Case(
        PLAIN + """create function public.may_name(w uuid, bucket text, path text) returns boolean language sql as
          $$ select bucket = 'library' and path = 'for-' || w || '.jpg' $$;""",
        [], "public.may_name", [{"storage_path": "for-{w1}.jpg"}], [{"storage_path": "for-{w2}.jpg"}, {"storage_path": "x"}],
        "public.may_name",
    ),
}  # fmt: skip


def nobody(option: str, question: str, answers: object) -> str:
    raise HostError(f"{question} Say it with {option}.")


def find(url: str, wanted: str | None = None) -> Host:
    facts = read_facts(url)
    host = propose(facts, Choices(file_rule=wanted), nobody)
    rule = find_rule(url, facts, host, wanted, nobody, may_ask=False)
    return replace(host, files=rule, users_see_files=users_see_files(facts, rule))


def prepare(postgres: LocalPostgres, database: str, schema: str) -> str:
    with psycopg.connect(postgres.url("supabase_admin", database), autocommit=True) as connection:
        for name, value in IDS.items():
            schema = schema.replace(f"{{{name}}}", value)
        connection.execute(schema.encode())
        connection.execute(
            "grant all on all tables in schema public to postgres; grant select on all tables in schema public to authenticated"
        )
    return postgres.url("supabase_admin", database)


def insert(url: str, rows: list[dict[str, str]]) -> list[str]:
    made = []
    with psycopg.connect(url, autocommit=True) as connection:
        for row in rows:
            values = {"workspace_id": W1, **{name: value.format(**IDS) for name, value in row.items()}}
            places = ", ".join(["%s"] * len(values))
            statement = f"insert into public.assets ({', '.join(values)}) values ({places}) returning id::text"
            made += [row[0] for row in connection.execute(statement.encode(), list(values.values())).fetchall()]
    return made


@pytest.mark.parametrize("name", CASES)
def test_the_rule_is_found_and_holds(postgres: LocalPostgres, bare: str, name: str) -> None:
    case = CASES[name]
    url = prepare(postgres, bare, case.schema)
    insert(url, case.rows)
    host = find(url, case.wanted)
    from autotag.install.described import describe

    assert describe(host, read_facts(url))["whose a file is"].split(";")[0] == case.rule
    apply_migrations(url, host=host)
    own, foreign = insert(url, case.own), insert(url, case.foreign)
    with psycopg.connect(url, row_factory=dict_row) as connection:
        told = connection.execute("select * from autotag.describe_assets(%s::uuid[])", (own + foreign,)).fetchall()
    refused = {str(row["asset_id"]): row["refused"] == "foreign_file" for row in told}
    assert refused == {**dict.fromkeys(own, False), **dict.fromkeys(foreign, True)}
    assert all((row["path"] is None) == (row["refused"] == "foreign_file") for row in told)


def test_a_rule_that_does_not_fit_all_rows_is_not_taken(postgres: LocalPostgres, bare: str) -> None:
    url = prepare(postgres, bare, PLAIN)
    insert(url, [{"storage_path": "{w1}/a.jpg"}, {"storage_path": "flat.jpg"}])
    with pytest.raises(HostError) as refused:
        find(url)
    assert "--file-rule" in str(refused.value)
    assert "1 fit workspace-folder" in str(refused.value)
    assert find(url, "workspace-folder").files.name == "workspace-folder"


def test_a_table_with_a_rule_on_update_is_not_taken(postgres: LocalPostgres, bare: str) -> None:
    """A rule on update can prevent storing tags. Each image would be paid for and fail."""
    url = prepare(postgres, bare, PLAIN)
    with psycopg.connect(url) as connection:
        connection.execute("create rule sometimes as on update to assets where old.id is null do instead nothing")
    with pytest.raises(HostError, match='drop rule "sometimes"'):
        survey(url, Choices(), refuse_to_ask, may_ask=False)


def test_a_person_is_asked_when_rows_and_policies_disagree(postgres: LocalPostgres, bare: str) -> None:
    url = prepare(postgres, bare, PLAIN + FOLDERNAME + FOLDER_OF_USER)
    insert(url, [{"storage_path": "{w1}/a.jpg"}])
    asked: list[str] = []

    def answer(option: str, question: str, answers: object) -> str:
        asked.append(question)
        return "workspace-folder"

    facts = read_facts(url)
    host = propose(facts, Choices(), nobody)
    assert find_rule(url, facts, host, None, answer, may_ask=True).name == "workspace-folder"
    assert len(asked) == 1
    assert find(url).files.name == "workspace-folder", "without a person: the strictest that fits"


@pytest.mark.parametrize("wanted", ["nonsense", "public.nope", "autotag.file_rule"])
def test_a_rule_that_there_is_not_is_one_sentence(postgres: LocalPostgres, bare: str, wanted: str) -> None:
    url = prepare(postgres, bare, PLAIN)
    with pytest.raises(HostError, match="--file-rule"):
        find(url, wanted)


@pytest.mark.parametrize("rule", ["owner", "uploader-folder"])
@pytest.mark.parametrize("column", ["", ", uploaded_by uuid"])
def test_members_by_a_claim_know_no_owners(postgres: LocalPostgres, bare: str, rule: str, column: str) -> None:
    """With members by a claim, only a user's own token shows their workspaces. So it is unknown whether the uploader
    that a row names is a member."""
    url = prepare(postgres, bare, CLAIMS.replace("storage_path text", f"storage_path text{column}"))
    with pytest.raises(HostError, match="needs a table of members"):
        find(url, rule)
    if column:
        insert(url, [{"storage_path": "{u1}/a.jpg", "uploaded_by": "{u1}"}])
        with pytest.raises(HostError, match="--file-rule"):
            find(url)


def test_no_answer_about_members_takes_a_condition_from_a_rule() -> None:
    """Combines each way to define members with each file rule that needs them: it is refused, or the rule keeps its
    condition."""
    columns = {"workspace": "workspace_id", "user": "user_id"}
    kinds = {
        "table": Members("public.crew", **columns), "owner": Members(owner=True),
        "claim": Members(claim=("orgs",)), "function": Members(function="private.is_member"),
    }  # fmt: skip
    for (kind, members), name, uploader in itertools.product(
        kinds.items(), ("uploader-folder", "owner"), (None, "uploaded_by", "workspace_id")
    ):
        host = replace(Host(), members=members)
        host = replace(host, files=FileRule(name, ("assets",), uploader=uploader))
        if kind == "table":
            code = file_code(host, host.files)
            assert "from public.crew m where m.workspace_id = a.workspace_id" in code
            assert uploader is None or f"m.user_id = a.{uploader})" in code
        elif (kind, uploader) == ("owner", "workspace_id"):  # the owner of a row is its workspace
            assert "a.workspace_id::text" in file_code(host, host.files)
        else:
            for write in (lambda one: file_code(one, one.files), lambda one: render(TEMPLATE.read_text(), one)):
                with pytest.raises(HostError, match="needs a table of members"):
                    write(host)


def test_more_buckets_than_a_rule_lists_are_no_free_choice(postgres: LocalPostgres, bare: str) -> None:
    url = prepare(
        postgres,
        bare,
        BUCKETS + "insert into storage.buckets (id, name) select 'b' || i, 'b' || i from generate_series(1, 60) i;",
    )
    insert(url, [{"bucket": f"b{i}", "storage_path": "{w1}/a.jpg"} for i in range(1, 61)])
    with pytest.raises(HostError, match="more than 50 buckets"):
        find(url)
    assert find(url, "any").files.name == "any"


def test_colleagues_are_said_where_a_rule_is_about_persons(postgres: LocalPostgres, bare: str) -> None:
    """A person is in two workspaces. With this rule, colleagues in one can name their files of the other, and the
    doctor warns about it."""
    url = prepare(
        postgres,
        bare,
        UPLOADERS
        + """
        alter table public.assets enable row level security;
        grant insert on public.assets to authenticated;
        create policy r on public.assets for select to authenticated using (exists (
          select 1 from public.workspace_members m where m.workspace_id = assets.workspace_id and m.user_id = auth.uid()));
        create policy p on public.assets for insert to authenticated with check (storage_path is not null);""",
    )
    insert(url, [{"storage_path": "{u1}/a.jpg", "uploaded_by": "{u1}"}])
    apply_migrations(url, host=find(url))

    def said() -> tuple[str, str]:
        with psycopg.connect(url) as connection:
            row = connection.execute(
                "select f ->> 'level', f ->> 'message' from jsonb_array_elements(autotag.diagnose() -> 'findings') f where f ->> 'check' = 'files'"
            ).fetchone()
        assert row is not None
        return str(row[0]), str(row[1])

    assert said()[0] == "warning"
    assert "members of their workspace" in said()[1]
    assert "any file of a colleague" in said()[1]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "alter policy p on public.assets with check (storage_path is not null and uploaded_by = (select auth.uid()))"
        )
    assert said()[0] == "ok"


@pytest.mark.parametrize("bucket", ["a/b", "..", ".", "", "a\nb", "b\\c", "x" * 101, "ä"])
def test_what_is_no_bucket_is_refused(postgres: LocalPostgres, bare: str, bucket: str) -> None:
    url = prepare(postgres, bare, PLAIN)
    with pytest.raises(HostError, match="bucket"):
        propose(read_facts(url), Choices(bucket=bucket or " \t"), nobody)


@pytest.mark.parametrize(
    ("policies", "asked"),
    [("", False), (OWNER, True), ("create policy p on storage.objects for insert to authenticated with check (true)", False),
     ("create policy p on storage.objects for select to service_role using (true)", False),
     ("create policy p on storage.objects for select to public using (true)", True),
     ("create policy p on storage.objects for select to public using (bucket_id = 'avatars')", False),
     ("create policy p on storage.objects for select to public using (bucket_id in ('avatars', 'library'))", True),
     ("create policy p on storage.objects for select to public using (bucket_id = any (array['a', 'library']))", True)],
)  # fmt: skip
def test_row_level_security_is_asked_where_users_see_files_at_all(
    postgres: LocalPostgres, bare: str, policies: str, asked: bool
) -> None:
    url = prepare(postgres, bare, PLAIN + policies)
    assert find(url).users_see_files == asked


def test_every_rule_has_its_case() -> None:
    from autotag.install.files import RULES

    assert {case.rule.split(":")[0].split(" ")[0] for case in CASES.values()} >= set(RULES)
    assert len(list(itertools.chain.from_iterable(case.foreign for case in CASES.values()))) > 25


# -- whoever writes rows does not write SQL


INJECTION = "x$$ set check_function_bodies = off; create role owned_by_tenant login; select $$"


@pytest.mark.parametrize("how", ["a row's bucket", "a bucket", "a path", "a folder"])
def test_what_rows_and_buckets_are_called_is_no_sql(postgres: LocalPostgres, bare: str, how: str) -> None:
    """init writes names of buckets and folders into the adapter, and users choose these. None of them becomes SQL."""
    url = prepare(postgres, bare, BUCKETS)
    row = {"bucket": "library", "storage_path": "{w1}/a.jpg"}
    if how in ("a row's bucket", "a bucket"):
        row["bucket"] = INJECTION
    if how == "a bucket":
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("insert into storage.buckets (id, name) values (%s, %s)", (INJECTION, INJECTION))
    if how in ("a path", "a folder"):
        row["storage_path"] = f"{INJECTION}/{{w1}}/a.jpg" if how == "a folder" else f"{{w1}}/{INJECTION}"
    insert(url, [{"bucket": "library", "storage_path": "{w1}/b.jpg"}, row] if how != "a folder" else [row])
    # A row that names what is no bucket fits no rule, so init asks.
    host = find(url, "workspace-folder" if how == "a row's bucket" else None)
    if how == "a bucket":
        assert INJECTION in host.files.buckets
    else:
        assert INJECTION not in str(host.files)
    apply_migrations(url, host=host)
    with psycopg.connect(url) as connection:
        assert connection.execute("select 1 from pg_roles where rolname = 'owned_by_tenant'").fetchone() is None


@pytest.mark.parametrize(
    "name", ["a'b", "a$b", "a$$b", "$$", "a\\b", "\\044$", "'$'", "$a$", "public.assets", "{{ table }}", "a.id"]
)
def test_a_string_stays_the_string_it_was(postgres: LocalPostgres, name: str) -> None:
    from autotag.install.quoting import literal

    text = f"do $$ begin perform set_config('my.text', {literal(name)}, true); end $$"
    with psycopg.connect(postgres.url()) as connection:
        connection.execute(text.encode())
        assert connection.execute("select current_setting('my.text')").fetchone() == (name,)


def test_a_name_that_would_end_a_function_is_refused(postgres: LocalPostgres, bare: str) -> None:
    url = prepare(postgres, bare, PLAIN.replace("storage_path text", '"storage_path" text, "a$$b" text'))
    facts = read_facts(url)
    host = propose(facts, Choices(path="a$$b"), nobody)
    with pytest.raises(HostError, match=r"\$\$"):
        apply_migrations(url, host=host)


def test_one_row_does_not_push_a_rule_below_what_the_policies_say(postgres: LocalPostgres, bare: str) -> None:
    url = prepare(postgres, bare, PLAIN + FOLDERNAME + FOLDER_OF_TENANT + OBJECTS)
    insert(url, [{"storage_path": "{w1}/a.jpg"}, {"storage_path": "a.jpg"}])
    with pytest.raises(HostError, match="--file-rule"):
        find(url)


def test_a_policy_of_another_bucket_says_nothing(postgres: LocalPostgres, bare: str) -> None:
    url = prepare(
        postgres,
        bare,
        PLAIN
        + """
        create table public.w (owner_id uuid);
        create policy p on storage.objects for select to authenticated
          using (bucket_id = 'logos' and exists (select from public.w where w.owner_id = auth.uid()));
        create policy q on storage.objects for select to authenticated
          using (exists (select from public.w where w.owner_id = auth.uid()));""",
    )
    assert find(url).files.name == "workspace-folder"
