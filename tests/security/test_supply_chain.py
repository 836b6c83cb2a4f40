"""Only reviewed packages are installed: every package is pinned by its hash."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pip
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
GROUPS = PROJECT["dependency-groups"]
#: Each file of requirements/, and what has to be in it.
SETS = {
    "build": [*PROJECT["build-system"]["requires"], *GROUPS["build"]],
    "worker": [*PROJECT["project"]["dependencies"], *EXTRAS["otel"]],
    "local": [*PROJECT["project"]["dependencies"], *GROUPS["local"]],
    "dev": [*PROJECT["project"]["dependencies"], *GROUPS["local"], *GROUPS["dev"]],
    "bench": [
        *PROJECT["project"]["dependencies"],
        *EXTRAS["otel"],
        *(r for name in ("local", "dev", "bench") for r in GROUPS[name]),
    ],
}


def pins(name: str) -> list[Requirement]:
    """The packages that a file of requirements/ installs, including those of the file that it begins with. Checks that
    the file has only pinned versions with hashes."""
    found = []
    for entry in (ROOT / "requirements" / f"{name}.txt").read_text().replace("\\\n", " ").splitlines():
        if base := re.fullmatch(r"-r (\w+)\.txt", entry):
            found += pins(base[1])
        elif not entry.startswith("#"):
            what, *hashes = entry.split("--hash=")
            assert hashes, f"{what} of {name}.txt has no hash"
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", one) for one in hashes)
            found.append(Requirement(what))
            assert re.fullmatch(r"==[\w.]+", str(found[-1].specifier)), f"{what} of {name}.txt is not one version"
            assert not found[-1].url
    return found


@pytest.mark.parametrize("name", SETS)
def test_every_dependency_is_pinned_with_its_hashes(name: str) -> None:
    pinned = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins(name)}
    for wanted in map(Requirement, SETS[name]):
        assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), f"{wanted}: run scripts/lock"
    assert len({(canonicalize_name(p.name), str(p.specifier)) for p in pins(name)}) == len(pinned), "two versions"


def test_one_version_for_all_and_no_file_beside() -> None:
    everywhere = {(canonicalize_name(p.name), str(p.specifier)) for name in SETS for p in pins(name)}
    assert len(everywhere) == len({name for name, _ in everywhere})
    assert {path.stem for path in (ROOT / "requirements").iterdir()} == set(SETS)


def test_what_benches_need_is_installed_for_nothing_else() -> None:
    others = {canonicalize_name(p.name) for name in ("worker", "local", "dev") for p in pins(name)}
    assert not others & {canonicalize_name(Requirement(r).name) for r in GROUPS["bench"]}


def test_these_tests_run_with_the_pinned_packages() -> None:
    for pin in pins("dev"):
        if not pin.marker or pin.marker.evaluate():
            assert version(pin.name) == str(pin.specifier)[2:], f"{pin.name}: run scripts/setup"


def wheel(folder: Path, content: str) -> str:
    """Makes a wheel of a package tiny 1.0, and returns its hash."""
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tiny.py", content)
        file.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        file.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("tiny-1.0.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with only our version of pip, to copy, because installing one takes seconds."""
    path = tmp_path_factory.mktemp("environment") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
    [site] = path.glob("lib/*/site-packages")
    shutil.copytree(Path(pip.__file__).parent, site / "pip")
    return path


@pytest.mark.parametrize(("which", "tampered"), [("build", True), ("local", True), ("local", False)])
def test_setup_refuses_a_package_that_was_changed(
    tmp_path: Path, environment: Path, which: str, tampered: bool
) -> None:
    shutil.copytree(environment, tmp_path / ".venv", symlinks=True)
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup", tmp_path / "scripts")
    # A backend of its own that says that it was reached: everything before it was installed.
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "own"\nbackend-path = ["."]\n'
    )
    (tmp_path / "own.py").write_text('raise SystemExit("building it now")\n')
    (tmp_path / "requirements").mkdir()
    for name in SETS:
        (tmp_path / "requirements" / f"{name}.txt").write_text("# nothing\n")
    good = wheel(tmp_path, "print('good')")
    (tmp_path / "requirements" / f"{which}.txt").write_text(f"tiny==1.0 \\\n    --hash=sha256:{good}\n")
    if tampered:
        wheel(tmp_path, "print('evil')")
    done = subprocess.run(
        [tmp_path / "scripts" / "setup", "local"], capture_output=True, text=True, check=False,
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, "HOME": str(tmp_path), "PIP_CONFIG_FILE": os.devnull,
             "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)},
    )  # fmt: skip
    installed = [*(tmp_path / ".venv").glob("lib/*/site-packages/tiny.py")]
    assert done.returncode
    assert not (tmp_path / ".venv" / ".setup").exists(), "the next setup would believe that everything is there"
    if tampered:
        assert "DO NOT MATCH THE HASHES" in done.stderr
        assert not installed
    else:
        assert "building it now" in done.stderr, done.stderr
        assert installed


@pytest.mark.parametrize("function", ["auto_tag_asset", "openai-webhook"])
def test_an_edge_function_runs_one_version_of_each_package(function: str) -> None:
    """An edge function has a key of the project. So its imports and their dependencies are pinned by hash."""
    folder = ROOT / "supabase" / "functions" / function
    imports = json.loads((folder / "deno.json").read_text())["imports"]
    for name, what in imports.items():
        assert re.fullmatch(rf"npm:{re.escape(name)}@\d+\.\d+\.\d+", what), f"{what} is not one version"
    lock = json.loads((folder / "deno.lock").read_text())
    # Supabase's edge runtime of before March 2026 reads no newer format (supabase/edge-runtime, issue 615).
    assert lock["version"] == "4"
    assert {*lock["specifiers"]} == {*lock["workspace"]["dependencies"]} == {*imports.values()}
    for package, about in lock["npm"].items():
        assert about["integrity"].startswith("sha512-"), package
        for needed in about.get("dependencies", []):
            assert any(one.startswith(f"{needed}@") for one in lock["npm"]), f"{needed} of {package} is not in the lock"
    # The tests run the same ones, out of node_modules.
    tested = json.loads((ROOT / "package-lock.json").read_text())["packages"]
    for package, about in lock["npm"].items():
        name, _, number = package.rpartition("@")
        there = tested[f"node_modules/{name}"]
        assert (there["version"], there["integrity"]) == (number, about["integrity"]), f"{package}: run scripts/lock"
    source = (folder / "index.ts").read_text()
    assert {*re.findall(r"^import .* from '(.*)'$", source, re.MULTILINE)} == {*imports}


def test_every_edge_function_is_looked_at() -> None:
    names = {path.parent.name for path in (ROOT / "supabase" / "functions").glob("*/index.ts")}
    assert names == {"auto_tag_asset", "openai-webhook"}


def test_npm_packages_have_their_hashes() -> None:
    lock = json.loads((ROOT / "package-lock.json").read_text())
    packages = {path: about for path, about in lock["packages"].items() if path}
    assert len(packages) > 20
    for path, about in packages.items():
        if "node_modules/" not in path or about.get("link"):
            continue  # this repository's own workspaces
        assert about["integrity"].startswith("sha512-"), path
        assert about.get("resolved", "https://registry.npmjs.org/").startswith("https://registry.npmjs.org/"), path
    wanted = json.loads((ROOT / "package.json").read_text())["devDependencies"]
    assert {f"node_modules/{name}" for name in wanted} <= set(packages)
