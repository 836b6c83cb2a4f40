"""Code and addresses that people give to `autotag init`: conditions, claims, the project's URL (install/)."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotag.install.answers import HostError
from autotag.install.conditions import check_form
from autotag.install.members import read_claim
from autotag.install.origin import storage_hosts

REF = "abcdefghijklmnopqrst"


@pytest.mark.parametrize(
    "condition",
    [
        "deleted_at is null", "a = ';'", "a = '--' and b = '/*'", "a = ')' or (b = '(')", """ "a;b" = 1 """, "a = 'it''s'",
        r"a = E'it\'s;'", "a ->> 'x' = 'y'", "a - -1 > 0", "exists (select from t where t.id = a.id)", "a = 'ä$'", "a / b * c > 0",
    ],
)  # fmt: skip
def test_a_condition_stays_as_it_is(condition: str) -> None:
    assert check_form(condition, "--where") == condition.strip()


@pytest.mark.parametrize(
    "condition",
    [
        "", "  ", "true) or (true", "(a", "a)", "true; drop table t", "true --", "true /* a", "a = 'x", 'a = "x', "a = $1",
        "a = $$x$$", "a = $x$)$x$", "a = '$$'", """ "a$$b" = 1 """, r"a = E'x\'", "a" * 2001, "a = '\0", "a \\ b",
    ],
)  # fmt: skip
def test_what_is_more_than_a_condition_is_refused(condition: str) -> None:
    with pytest.raises(HostError, match="--where"):
        check_form(condition, "--where")


@pytest.mark.parametrize("claim", ["", ".", "a..b", "user_metadata.org", "raw_user_meta_data.org", "a\nb", "a.$$"])
def test_no_claim(claim: str) -> None:
    with pytest.raises(HostError, match="--members-claim"):
        read_claim(claim, "--members-claim")


def test_a_claim_is_a_path_or_one_name() -> None:
    assert read_claim("app_metadata.org_ids", "") == ("app_metadata", "org_ids")
    assert read_claim("https://app.example/org", "") == ("https://app.example/org",)


def test_the_hosts_of_a_project_are_known_and_not_guessed(tmp_path: Path) -> None:
    folder = tmp_path / "supabase" / "migrations"
    host = f"{REF}.supabase.co"
    assert storage_hosts(f"postgresql://postgres@db.{REF}.supabase.co/postgres", None, None) == (host,)
    assert storage_hosts(
        f"postgresql://postgres.{REF}@aws-0-eu-west-1.pooler.supabase.com:6543/postgres", None, None
    ) == (host,)
    assert storage_hosts("postgresql://postgres@127.0.0.1:54322/postgres", None, folder) == (
        "127.0.0.1:54321",
        "localhost:54321",
    )
    assert storage_hosts("postgresql://postgres@db.example.com/postgres", None, None) == ()
    assert storage_hosts("postgresql://x@h/d", "https://Storage.example.com/", None) == ("storage.example.com",)
    (tmp_path / "supabase" / ".temp").mkdir(parents=True)
    (tmp_path / "supabase" / ".temp" / "project-ref").write_text(f"{REF}\n")
    assert storage_hosts("postgresql://x@h/d", None, folder) == (host,)
    with pytest.raises(HostError, match="--project-url"):
        storage_hosts("postgresql://x@h/d", "supabase.co", None)
