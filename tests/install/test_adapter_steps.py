"""Additions of a newer adapter reach projects that have an older one (install/migrations.py, ADAPTER_STEPS)."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest

from autotag.install import migrations as install
from autotag.install.adapter import TEMPLATE
from autotag.install.host import Host
from autotag.install.written import HOST_ADAPTER
from lab.postgres import LocalPostgres

VERSION = re.compile(r"autotag\.adapter_version\(\).*?select (\d+)", re.DOTALL)
STEP = """\
create or replace function autotag.count_assets(p_workspace_id autotag.workspace_id) returns bigint
language sql stable security definer set search_path = pg_catalog, public, extensions, pg_temp
as $$ select count(*) from {{ table }} a where a.{{ workspace }} = p_workspace_id $$;
create or replace function autotag.adapter_version() returns integer
language sql immutable set search_path = pg_catalog, pg_temp
as $$ select 1001 $$;
"""


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a step that only a newer adapter has."""
    monkeypatch.setitem(install.ADAPTER_STEPS, 1001, STEP)
    return f"{HOST_ADAPTER}_1001"


def test_the_template_has_the_version_of_the_newest_step() -> None:
    found = VERSION.search(TEMPLATE.read_text())
    assert found
    assert int(found[1]) == max(install.ADAPTER_STEPS, default=1), "a change of the template needs a step"
    assert sorted(install.ADAPTER_STEPS) == list(range(2, int(found[1]) + 1))


def test_each_step_is_in_the_template_and_ends_with_its_version() -> None:
    template = TEMPLATE.read_text()
    for version, text in install.ADAPTER_STEPS.items():
        assert VERSION.findall(text) == [str(version)]
        for name in re.findall(r"create or replace function (autotag\.\w+)", text):
            assert f"create or replace function {name}(" in template, name


def test_an_installation_gets_the_step_once(postgres: LocalPostgres, database: str, step: str) -> None:
    url = postgres.url(database=database)
    assert install.apply_migrations(url, with_host_baseline=True) == [step]
    assert install.apply_migrations(url, with_host_baseline=True) == []
    with psycopg.connect(url) as connection:
        row = connection.execute("select autotag.adapter_version(), autotag.count_assets(gen_random_uuid())").fetchone()
    assert row == (1001, 0)


def test_a_project_gets_the_step_as_a_file_behind_its_own(tmp_path: Path, step: str) -> None:
    (tmp_path / "20261201000000_autotag_host_adapter.sql").write_text("-- ours\nautotag.adapter_version() select 1")
    written = install.write_migrations(tmp_path, Host(), {}, adapter=1)
    [name] = [name for name in written if name.endswith(f"_autotag_{step}.sql")]
    assert written[name] == "written"
    assert "from public.assets a where a.workspace_id" in (tmp_path / name).read_text()
    again = install.write_migrations(tmp_path, Host(), {}, adapter=1)
    assert again[name] == "there"
