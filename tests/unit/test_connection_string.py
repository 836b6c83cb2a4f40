"""Connection strings as people paste them."""

from __future__ import annotations

from urllib.parse import quote

import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict
from pydantic import PostgresDsn, TypeAdapter

from autotag.cli.errors import unreachable
from autotag.config import read_connection
from autotag.redact import redact, remember_connection

DIRECT = {"host": "db.abc.supabase.co", "port": "5432", "user": "postgres", "password": "secret", "dbname": "postgres"}
POOLER = {**DIRECT, "host": "aws-0-eu-central-1.pooler.supabase.com", "port": "6543", "user": "postgres.abc"}
AT_POOLER = "postgres.abc:secret@aws-0-eu-central-1.pooler.supabase.com:6543/postgres"
AT_DIRECT = "postgres:secret@db.abc.supabase.co:5432/postgres"


@pytest.mark.parametrize(
    ("pasted", "meant"),
    [
        (f"postgresql://{AT_DIRECT}", DIRECT),
        (f"postgres://{AT_DIRECT}", DIRECT),
        (f"POSTGRESQL://{AT_DIRECT}", DIRECT),
        *((f"postgresql+{driver}://{AT_DIRECT}", DIRECT) for driver in ("psycopg", "psycopg2", "psycopg_async", "asyncpg", "pg8000")),
        ("jdbc:postgresql://db.abc.supabase.co:5432/postgres?user=postgres&password=secret", DIRECT),
        ("jdbc:postgresql://db.abc.supabase.co:5432/postgres?user=postgres&password=secret&prepareThreshold=0", DIRECT),
        (f"postgresql://{AT_POOLER}?pgbouncer=true", POOLER),
        (f"postgresql://{AT_POOLER}?pgbouncer=true&connection_limit=1&pool_timeout=20", POOLER),
        (f"postgres://{AT_POOLER}?schema=public&supa=base-pooler.x", POOLER),
        (f"postgres://{AT_POOLER}?sslmode=require&supa=base-pooler.x", {**POOLER, "sslmode": "require"}),
        (f"postgres://{AT_POOLER}?ssl=true", {**POOLER, "sslmode": "require"}),
        (f"postgres://{AT_POOLER}?sslmode=no-verify", {**POOLER, "sslmode": "require"}),
        (f"postgres://{AT_POOLER}?sslmode=verify-full&ssl=true", {**POOLER, "sslmode": "verify-full"}),
        (f"postgres://{AT_POOLER}?statement_cache_size=0&prepared_statements=false", POOLER),
        (f"postgresql://{AT_DIRECT}?connect_timeout=10&application_name=a%20b",
         {**DIRECT, "connect_timeout": "10", "application_name": "a b"}),
        (f"'postgresql://{AT_DIRECT}'", DIRECT),
        (f'"postgresql://{AT_DIRECT}"\n', DIRECT),
        (f"\ufeff postgresql://{AT_DIRECT}\r\n", DIRECT),
        (f"“postgresql://{AT_DIRECT}”", DIRECT),
        (f"DATABASE_URL=postgresql://{AT_DIRECT}", DIRECT),
        (f'export DATABASE_URL="postgresql://{AT_DIRECT}"', DIRECT),
        (f"DATABASE_URL: 'postgresql://{AT_DIRECT}'", DIRECT),
        (f'psql "postgresql://{AT_DIRECT}"', DIRECT),
        (f"postgresql://{AT_DIRECT};", DIRECT),
        ("postgresql://postgres:secret@\n   db.abc.supabase.co:5432/postgres", DIRECT),
        ("host=db.abc.supabase.co port=5432 user=postgres password=secret dbname=postgres", DIRECT),
        ("host=db.abc.supabase.co port=5432 user=postgres password='se cret' dbname=postgres", {**DIRECT, "password": "se cret"}),
        ("host=/var/run/postgresql user=postgres dbname=x", {"host": "/var/run/postgresql", "user": "postgres", "dbname": "x"}),
        ("postgresql://localhost/x", {"host": "localhost", "dbname": "x"}),
        ("postgresql:///x?host=/tmp", {"host": "/tmp", "dbname": "x"}),
        ("postgresql://u@[::1]:5432/x", {"host": "::1", "port": "5432", "user": "u", "dbname": "x"}),
        ("postgresql://u@a:1,b:2/x?target_session_attrs=read-write",
         {"host": "a,b", "port": "1,2", "user": "u", "dbname": "x", "target_session_attrs": "read-write"}),
        ("postgresql://us%40er:p@h/x", {"host": "h", "user": "us@er", "password": "p", "dbname": "x"}),
        # Elixir's and Django's names of Postgres
        *((f"{name}://{AT_POOLER}", POOLER) for name in ("ecto", "postgis", "postgresql+psycopg2cffi")),
        # shells, options and files
        (f'psql -d "postgresql://{AT_POOLER}"', POOLER),
        (f"--db-url postgresql://{AT_POOLER}", POOLER),
        (f"--dbname=postgresql://{AT_POOLER}", POOLER),
        (f"$env:DATABASE_URL='postgresql://{AT_POOLER}'", POOLER),
        (f"<postgresql://{AT_POOLER}>", POOLER),
        (f'"DATABASE_URL": "postgresql://{AT_POOLER}",', POOLER),
        (f"postgresql://{AT_POOLER}\\n", POOLER),
        # .NET, as the dashboard writes it and as people do
        ("User Id=postgres.abc;Password=secret;Server=aws-0-eu-central-1.pooler.supabase.com;Port=6543;Database=postgres", POOLER),
        ("Host=aws-0-eu-central-1.pooler.supabase.com;Port=6543;Database=postgres;Username=postgres.abc;Password='se;''c=r';"
         "SSL Mode=VerifyFull;Trust Server Certificate=true", {**POOLER, "password": "se;'c=r", "sslmode": "verify-full"}),
        # parameters of other drivers, in their spelling
        (f"jdbc:{'postgresql://h/x?user=u&password=a+b%2Bc'}&ApplicationName=y&reWriteBatchedInserts=true&currentSchema=public",
         {"host": "h", "dbname": "x", "user": "u", "password": "a b+c", "application_name": "y"}),
        ("postgresql://h/x?user=u&password=a+b", {"host": "h", "dbname": "x", "user": "u", "password": "a+b"}),
        (f"postgresql://{AT_POOLER}?sslmode=Require&statement_timeout=5000&pool_mode=transaction&ssl_context=true",
         {**POOLER, "sslmode": "require"}),
        (f"postgresql://{AT_POOLER}&pgbouncer=true", POOLER),
        (f"postgresql://{AT_POOLER}?options=reference%3Dabc", {**POOLER, "options": "reference=abc"}),
        # IPv6
        ("postgresql://postgres:secret@[2600:1f1c::1]:5432/postgres", {**DIRECT, "host": "2600:1f1c::1"}),
        ("postgresql://postgres:secret@[fe80::1%25eth0]:5432/postgres", {**DIRECT, "host": "fe80::1%eth0"}),
        ("postgresql://[2600:1f1c::1]:5432/postgres?user=postgres&password=secret", {**DIRECT, "host": "2600:1f1c::1"}),
        ("host=2600:1f1c::1 port=5432 dbname=postgres user=postgres password=secret", {**DIRECT, "host": "2600:1f1c::1"}),
        # passwords
        *((f"postgresql://postgres:{p}@db.abc.supabase.co:5432/postgres", {**DIRECT, "password": meant}) for p, meant in (
            ("100%25", "100%"), ("pass%word%", "pass%word%"), ("p@ss:w/o#rd?", "p@ss:w/o#rd?"), ("[secret]", "[secret]"))),
    ],
)  # fmt: skip
def test_it_is_read_as_it_was_meant(pasted: str, meant: dict[str, str]) -> None:
    assert conninfo_to_dict(read_connection(pasted)) == meant


@pytest.mark.parametrize(
    ("pasted", "sentence"),
    [
        ("postgresql://postgres:[YOUR-PASSWORD]@db.abc.supabase.co:5432/postgres", r"placeholder \[YOUR-PASSWORD\]"),
        ("postgresql://postgres:<password>@db.abc.supabase.co:5432/postgres", "placeholder <password>"),
        ("postgresql://postgres:${DB_PASSWORD}@db.abc.supabase.co:5432/postgres", "placeholder"),
        ("postgresql://postgres:p@db.[YOUR-PROJECT-REF].supabase.co:5432/postgres", "."),
        ("https://abc.supabase.co", "must start with postgresql://"),
        ("mysql://u:p@h/x", "must start with postgresql://"),
        ("db.abc.supabase.co", "must start with postgresql://"),
        (
            "postgresql://u:p@h/x?sslmod=verify-full",
            "has the parameter sslmod, which Postgres does not know; remove it",
        ),
        ("host=a,b dbname=x", "names several hosts"),
        ("postgresql://postgres:secret@2600:1f1c::1:5432/postgres", "IPv6 address without brackets"),
        ("host=h user=u password=[YOUR-PASSWORD] dbname=x", r"placeholder \[YOUR-PASSWORD\]"),
        ("User Id=postgres.abc;Password=[YOUR-PASSWORD];Server=h;Port=6543;Database=postgres", "placeholder"),
        ("postgresql://postgres.[YOUR-PROJECT-REF]:p@h:6543/postgres", "placeholder"),
        ("jdbc:postgresql://h/x?user=u&password=p&targetServerType=primary", "has the parameter targetServerType"),
        ("psql -h db.abc.supabase.co -p 5432 -d postgres -U postgres", "must start with postgresql://"),
        ("prisma+postgres://accelerate.prisma-data.net/?api_key=x", "must start with postgresql://"),
        ("postgresql:u:p@h/x", "must start with postgresql://"),
    ],
)
def test_or_one_sentence_says_what_to_change(pasted: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_connection(pasted)


PASSWORDS = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x2FFF, exclude_categories=("C", "Z")), min_size=1, max_size=30
)


@settings(deadline=None)
@given(PASSWORDS)
@example("a#b")
@example("a@b")
@example("a/b")
@example("a%b")
@example("a?b=c")
@example("a:b@c:d")
@example("@/#?%")
@example("100%")
@example("%41@")
def test_every_password_is_understood_encoded_or_not(password: str) -> None:
    for host in ("db.abc.supabase.co:5432", "localhost", "127.0.0.1:1"):
        encoded = read_connection(f"postgresql://u:{quote(password, safe='')}@{host}/x")
        assert conninfo_to_dict(encoded)["password"] == password
        if any(c in password for c in "@/?#") or "%" not in password:
            url = read_connection(f"postgresql://u:{password}@{host}/x?pgbouncer=true")
            assert conninfo_to_dict(url)["password"] == password
            assert url == encoded


@settings(deadline=None)
@given(PASSWORDS.filter(lambda p: len(p) > 7))
def test_no_form_of_the_password_is_printed(password: str) -> None:
    url = read_connection(f"postgresql://u:{quote(password, safe='')}@h/x")
    remember_connection(url)
    for form in (password, quote(password, safe=""), url, str(TypeAdapter(PostgresDsn).validate_python(url))):
        assert password not in redact(f"it said: {form}")


@settings(deadline=None)
@given(st.text(max_size=60))
@example("postgresql://")
@example("postgresql://@")
@example("postgresql://:@:/?=")
@example("=")
@example("host=")
def test_rubbish_is_one_sentence(text: str) -> None:
    for pasted in (text, f"postgresql://{text}", f"postgresql://u:hunter2@{text}"):
        if pasted.startswith("@"):
            continue  # names a file
        said = ""
        try:
            read_connection(pasted)
        except ValueError as error:
            said = str(error)
        assert "hunter2" not in said
        assert "\n" not in said


@pytest.mark.parametrize(
    ("reason", "only_ipv6"),
    [
        ('connection to server at "db.abcdefghijklmnopqrst.supabase.co" (2600:1f1::1), port 5432 failed: Network is unreachable', True),
        ("failed to resolve host 'db.abcdefghijklmnopqrst.supabase.co': [Errno -5] No address associated with hostname", True),
        ('connection to server at "db.abcdefghijklmnopqrst.supabase.co" (2600:1f1::1), port 5432 failed: FATAL: password'
         ' authentication failed', False),
        ('connection to server at "10.0.0.1", port 5432 failed: Network is unreachable', False),
    ],
)  # fmt: skip
def test_a_host_with_only_an_ipv6_address_has_a_pooler(reason: str, only_ipv6: bool) -> None:
    said = unreachable(psycopg.OperationalError(reason))
    assert (
        "user postgres.abcdefghijklmnopqrst, host aws-…-<region>.pooler.supabase.com, port 5432" in said
    ) == only_ipv6
    assert ("check DATABASE_URL" in said) != only_ipv6
    assert said.count("\n") == 0
