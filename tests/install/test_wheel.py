"""The wheel: what is in it, and that it does its work where nothing else of this repository is."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import psycopg
import pytest

from conftest import ROOT
from lab.postgres import LocalPostgres
from lab.stack import edge_stack, make_worker_role
from support import until


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    [built] = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel alone, installed into a folder."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check",
         "--target", folder, wheel], check=True,
    )  # fmt: skip
    return folder


def test_what_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    product = ROOT / "worker" / "autotag"
    wanted = {str(path.relative_to(product.parent)) for path in product.rglob("*.*") if "__pycache__" not in path.parts}
    wanted |= {f"autotag/migrations/{path.name}" for path in (ROOT / "supabase" / "migrations").iterdir()}
    assert "autotag/install/host_adapter.sql" in wanted
    assert sum(name.startswith("autotag/migrations/") and name.endswith(".sql") for name in wanted) > 0
    assert {name for name in entries if ".dist-info/" not in name} == wanted
    kinds = {name: stat.S_IFMT(entry.external_attr >> 16) for name, entry in entries.items()}
    assert {name for name, kind in kinds.items() if kind not in (0, stat.S_IFREG)} == set(), "links, or worse"


def alone(site: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """A command and its environment, with the wheel and what it depends on. Without Python's module `site` the .pth
    file that leads to this repository is not read."""
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join([str(site), *sorted(packages)])}
    return [sys.executable, "-S", "-P", *arguments], environment


@pytest.mark.parametrize("package", ["lab", "benchmarks", "tests", "conftest", "support"])
def test_nothing_but_the_product_can_be_imported(site: Path, tmp_path: Path, package: str) -> None:
    command, environment = alone(site, "-c", "import sys, autotag, importlib.util as u; print(autotag.__file__);"
                                 " print(u.find_spec(sys.argv[1]))", package)  # fmt: skip
    done = subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [str(site / "autotag" / "__init__.py"), "None"]


async def test_an_empty_project_is_migrated_examined_and_worked_for(
    postgres: LocalPostgres, bare: str, site: Path, tmp_path: Path
) -> None:
    async def run(*arguments: str, **changes: str) -> tuple[int | None, str, str]:
        command, environment = alone(site, "-m", "autotag", *arguments)
        process = await asyncio.create_subprocess_exec(
            *command, env=environment | changes, cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()

    async with edge_stack(postgres, bare) as stack:
        code, _, err = await run("migrate", "--stand-alone", DATABASE_URL=stack.owner_url)
        assert code == 0, err
        make_worker_role(stack.owner_url)
        code, out, err = await run("doctor", "--json", **stack.operator_environment())
        told = json.loads(out)
        assert code == {"ok": 0, "warning": 1, "error": 2}[told["worst"]], err
        found = {finding["check"]: finding for finding in told["findings"]}
        assert found["schema"]["level"] == "ok", told

        command, environment = alone(site, "-m", "autotag", "worker")
        process = await asyncio.create_subprocess_exec(
            *command, env=environment | stack.worker_environment(), cwd=tmp_path, stderr=asyncio.subprocess.PIPE
        )
        try:
            await until(lambda: workers(stack.owner_url) == 1 or process.returncode is not None, "the worker")
        finally:
            if process.returncode is None:
                process.terminate()
            _, said = await process.communicate()
        assert process.returncode == 0, said.decode()
    assert workers(postgres.url(database=bare)) == 0, "it has given its place back"


def workers(url: str) -> int:
    with psycopg.connect(url) as connection:
        row = connection.execute("select count(*)::int from autotag.workers").fetchone()
    return int(row[0]) if row else 0
