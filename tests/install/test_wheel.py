"""The wheel: its contents, and its work without the rest of this repository."""

from __future__ import annotations

import asyncio
import json
import stat
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import psycopg
import pytest
from packaging.requirements import Requirement

from conftest import ROOT
from lab.postgres import LocalPostgres
from lab.stack import edge_stack, make_worker_role
from support import until


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    [built] = folder.iterdir()
    return built


def test_the_workflow_that_publishes_can_read_the_metadata(wheel: Path) -> None:
    """The pinned pypa/gh-action-pypi-publish refuses newer versions of the metadata; v1.13 and v1.14.0 refused 2.5."""
    assert (
        "gh-action-pypi-publish@dc37677b2e1c63e2034f94d8a5b11f265b73ba33 # v1.14.2"
        in (ROOT / ".github" / "workflows" / "release.yml").read_text()
    ), "check which versions of the metadata this release of the action reads (its requirements/runtime.txt)"
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        version = archive.read(metadata).decode().partition("\n")[0]
    assert version in ("Metadata-Version: 2.4", "Metadata-Version: 2.5")


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel and the packages that it declares, and nothing else.

    The packages are links to those of the test's environment, so this needs no network and takes about five seconds.
    """
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps",
         "--disable-pip-version-check", wheel], check=True,
    )  # fmt: skip
    [packages] = folder.glob("lib/python*/site-packages")
    for package in declared(packages):
        for top in {Path(file).parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(package.locate_file(top))))
    return python


def declared(packages: Path) -> list[Distribution]:
    """The distributions that the installed wheel depends on, directly or not, without its extras."""
    [wheel] = distributions(path=[str(packages)])
    found: dict[tuple[str, str], Distribution] = {}
    waiting = [(wheel, "")]
    while waiting:
        package, extra = waiting.pop()
        for line in package.requires or ():
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            for wanted in {"", *requirement.extras}:
                if (requirement.name, wanted) not in found:
                    found[requirement.name, wanted] = distribution(requirement.name)
                    waiting.append((found[requirement.name, wanted], wanted))
    return list(found.values())


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


@pytest.mark.parametrize("package", ["lab", "benchmarks", "tests", "conftest", "support", "pytest"])
def test_nothing_but_the_product_can_be_imported(installed: Path, tmp_path: Path, package: str) -> None:
    code = "import sys, autotag, importlib.util as u; print(autotag.__file__, u.find_spec(sys.argv[1]))"
    done = subprocess.run(
        [installed, "-c", code, package], env={}, cwd=tmp_path, check=True, capture_output=True, text=True
    )
    place, found = done.stdout.split()
    assert Path(place).is_relative_to(installed.parent.parent)
    assert found == "None"


def test_every_module_of_the_wheel_can_be_imported(installed: Path, tmp_path: Path) -> None:
    """So the dependencies of all modules are declared, including modules that few commands use."""
    code = (
        "import importlib, pkgutil, autotag\n"
        "for m in pkgutil.walk_packages(autotag.__path__, 'autotag.'):\n"
        "    m.name.endswith('__main__') or importlib.import_module(m.name)"
    )
    done = subprocess.run([installed, "-c", code], env={}, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


async def test_an_empty_project_is_migrated_examined_and_worked_for(
    postgres: LocalPostgres, bare: str, installed: Path, tmp_path: Path
) -> None:
    async def run(*arguments: str, **changes: str) -> tuple[int | None, str, str]:
        process = await asyncio.create_subprocess_exec(
            installed.with_name("autotag"), *arguments, env=changes, cwd=tmp_path,
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
        assert code == {"ok": 0, "skipped": 0, "warning": 1, "error": 2}[told["worst"]], err
        found = {finding["check"]: finding for finding in told["findings"]}
        assert found["schema"]["level"] == "ok", told

        process = await asyncio.create_subprocess_exec(
            installed.with_name("autotag"), "worker", env=stack.worker_environment(), cwd=tmp_path,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
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
