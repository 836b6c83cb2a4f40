"""CI, releases and the development container name existing things, and test what the documents promise.

That the files are valid is checked in scripts/lint (check-jsonschema, hadolint).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from autotag import __version__
from conftest import ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = {path.name: path for path in (GITHUB / "workflows").iterdir()}
TEXTS = {name: path.read_text() for name, path in WORKFLOWS.items()}
PARSED = {name: yaml.safe_load(text) for name, text in TEXTS.items()}
TEST_SCRIPT = (ROOT / "scripts" / "test").read_text()
DEV_DOCKERFILE = (ROOT / ".devcontainer" / "Dockerfile").read_text()
#: A path of this repository, as a command names it.
PATH = re.compile(r"(?<![\w./$~-])(?:\./)?((?:scripts|worker|lab|tests|docs|deploy|supabase|requirements)/[\w./*-]+)")


def jobs() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for workflow, parsed in PARSED.items():
        for name, job in parsed["jobs"].items():
            yield workflow, name, job


def steps() -> Iterator[dict[str, Any]]:
    for _, _, job in jobs():
        yield from job.get("steps", [])


def commands() -> list[str]:
    return [step["run"] for step in steps() if "run" in step]


def test_every_path_that_is_named_is_there() -> None:
    named = {path for command in commands() for path in PATH.findall(command)}
    named |= {path for command in commands() for path in re.findall(r"(?<!\S)\./([\w./-]+)", command)}
    assert {"scripts/lint", "scripts/test", "scripts/release", "scripts/release-notes", "scripts/build"} <= named
    for step in steps():
        values = step.get("with", {})
        named |= {values[key] for key in ("file", "cache-dependency-path") if key in values}
        named |= set(re.findall(r"'([^']+)'", "".join(re.findall(r"hashFiles\(([^)]*)\)", json.dumps(values)))))
    named |= {job["uses"].removeprefix("./") for _, _, job in jobs() if job.get("uses", "").startswith("./")}
    for path in named:
        assert any(ROOT.glob(path)), f"a workflow names {path}, which is not there"
        if path.startswith("scripts/"):
            assert os.access(ROOT / path, os.X_OK), f"{path} cannot be run"


def test_ci_runs_what_the_readme_says() -> None:
    ci = PARSED["ci.yml"]["jobs"]
    assert [step["run"] for step in ci["lint"]["steps"] if "run" in step] == ["./scripts/lint"]
    assert [step["run"] for step in ci["test"]["steps"] if "run" in step] == ["./scripts/test"]
    assert next(step["run"] for step in ci["demo"]["steps"] if "run" in step) == "./scripts/demo --json"
    readme = (ROOT / "README.md").read_text()
    for command in ("./scripts/demo", "./scripts/lint", "./scripts/test", "pip install ."):
        assert command in readme


def test_ci_runs_the_demo_and_the_contract_on_the_real_services() -> None:
    steps = [step["run"] for step in PARSED["ci.yml"]["jobs"]["supabase"]["steps"] if "run" in step]
    wanted = ("supabase start", "./scripts/demo --supabase", "pytest -q tests/clients/test_contract.py")
    assert [next((n for n, step in enumerate(steps) if part in step), None) for part in wanted] == [1, 2, 3]
    assert (ROOT / "tests/clients/test_contract.py").exists()


def test_the_matrix_is_what_is_promised() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = {c.rsplit(" ", 1)[1] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)}
    matrix = PARSED["ci.yml"]["jobs"]["test"]["strategy"]["matrix"]
    assert set(matrix["python"]) == pythons
    assert project["requires-python"] == f">={min(pythons, key=lambda v: int(v.split('.')[1]))}"
    tried = {int(v) for v in matrix["postgres"]} | {int(cell["postgres"]) for cell in matrix["include"]}
    for document in ("docs/install.md", "supabase/config.toml", "CONTRIBUTING.md"):
        promised = re.search(r"(?:Postgres|runs on) (\d+) to (\d+)\b", (ROOT / document).read_text())
        assert promised, f"{document} says which versions of Postgres there may be"
        assert tried == set(range(int(promised[1]), int(promised[2]) + 1)), document
    squawk = tomllib.loads((ROOT / ".squawk.toml").read_text())
    assert float(squawk["pg_version"]) == min(tried)
    default = tomllib.loads((ROOT / "supabase" / "config.toml").read_text())["db"]["major_version"]
    assert default in tried


def test_node_is_the_oldest_that_is_promised() -> None:
    wanted = json.loads((ROOT / "package.json").read_text())["engines"]["node"].removeprefix(">=")
    used = {step["with"]["node-version"] for step in steps() if "setup-node" in step.get("uses", "")}
    used |= set(re.findall(r"^FROM node:(\d+)", DEV_DOCKERFILE, re.MULTILINE))
    assert used == {wanted}


def test_actions_are_named_by_commit_and_release() -> None:
    for name, text in TEXTS.items():
        for line in re.findall(r"uses: (?!\./)(.*)", text):
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), f"{name}: {line}"
    pins = set(re.findall(r"uses: (\S+@.*)", "".join(TEXTS.values())))
    assert len({pin.split("@")[0] for pin in pins}) == len(pins), "one release of each action everywhere"


def test_no_more_rights_than_needed() -> None:
    for workflow, parsed in PARSED.items():
        assert parsed["permissions"] == {"contents": "read"}, workflow
        assert "pull_request_target" not in TEXTS[workflow]
        assert "secrets." not in TEXTS[workflow], "nothing is signed with a key that could be stolen"
        assert parsed["concurrency"]["group"]
    more = {(w, n): job["permissions"] for w, n, job in jobs() if "permissions" in job}
    assert more == {
        ("release.yml", "pypi"): {"id-token": "write"},
        ("release.yml", "npm"): {"id-token": "write"},
        ("release.yml", "image"): {"contents": "read", "packages": "write"},
        ("release.yml", "github"): {"contents": "write"},
    }
    for _, name, job in jobs():
        assert "uses" in job or job["timeout-minutes"] <= 90, name
    for step in steps():
        if "actions/checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False
    assert not re.search(r"\$\{\{", "".join(commands())), "what comes from outside is no part of a script"


def test_nothing_is_published_before_all_tests_have_passed() -> None:
    release = PARSED["release.yml"]["jobs"]
    assert release["ci"]["uses"] == "./.github/workflows/ci.yml"
    assert "workflow_call" in PARSED["ci.yml"][True], "YAML reads the key `on` as true"
    for name in ("pypi", "npm", "image"):
        assert set(release[name]["needs"]) == {"ci", "build"}
    assert set(release["github"]["needs"]) == {"pypi", "npm", "image"}


def test_both_packages_have_the_same_version() -> None:
    assert json.loads((ROOT / "clients" / "js" / "package.json").read_text())["version"] == __version__


def test_npm_says_where_its_package_comes_from() -> None:
    """npm signs the commit and the workflow that made a package (provenance). For that, the package needs the
    repository's address."""
    [publish] = [step["run"] for step in PARSED["release.yml"]["jobs"]["npm"]["steps"] if "run" in step]
    assert "publish npm/*.tgz --provenance" in publish
    assert "repository" in json.loads((ROOT / "clients" / "js" / "package.json").read_text())


def test_the_container_has_what_the_tests_install() -> None:
    wanted = re.search(r"packages=\((.*?)\)", TEST_SCRIPT, re.DOTALL)
    assert wanted
    [major] = set(re.findall(r"postgresql-(\d+)", DEV_DOCKERFILE))
    packages = wanted[1].replace('"', "").replace("$major", major).split()
    installed = re.search(r"--no-install-recommends \\\n(.*?)&&", DEV_DOCKERFILE, re.DOTALL)
    assert installed
    assert installed[1].replace("\\", " ").split() == packages
    settings = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert (ROOT / ".devcontainer" / settings["build"]["dockerfile"]).exists()
    assert (ROOT / settings["postCreateCommand"]).exists()


def test_issue_forms_ask_for_what_helps_and_for_no_secrets() -> None:
    bug = (GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    assert "autotag doctor --json" in bug
    assert "Never paste a key" in bug
    assert "SECURITY.md" in (GITHUB / "ISSUE_TEMPLATE" / "config.yml").read_text()
    for path in re.findall(r"\]\(\.\./([^)#]+)", (GITHUB / "PULL_REQUEST_TEMPLATE.md").read_text()):
        assert (ROOT / path).exists(), path


def test_dependabot_looks_where_something_is_pinned() -> None:
    updates = yaml.safe_load((GITHUB / "dependabot.yml").read_text())["updates"]
    assert {u["package-ecosystem"] for u in updates} == {"pip", "npm", "docker", "github-actions"}
    for update in updates:
        for folder in update.get("directories", [update.get("directory")]):
            assert (ROOT / folder.strip("/")).is_dir(), folder


# -- scripts/release-notes


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository that has released 1.2.3."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "release-notes").write_bytes((ROOT / "scripts" / "release-notes").read_bytes())
    (tmp_path / "worker" / "autotag").mkdir(parents=True)
    (tmp_path / "worker" / "autotag" / "__init__.py").write_text('"""It."""\n\n__version__ = "1.2.3"\n')
    (tmp_path / "supabase" / "releases").mkdir(parents=True)
    (tmp_path / "supabase" / "releases" / "1.2.3.json").write_text("{}")
    (tmp_path / "CHANGELOG.md").write_text("# Changes\n\n## 1.2.3 (2026-12-01)\n\n- New.\n\n## 1.2.2\n\n- Old.\n")
    return tmp_path


def notes(tree: Path, tag: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", tree / "scripts" / "release-notes", tag]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_notes_are_the_section_of_the_version(tree: Path) -> None:
    done = notes(tree, "v1.2.3")
    assert (done.returncode, done.stdout.strip()) == (0, "- New."), done.stderr


@pytest.mark.parametrize(
    ("tag", "path", "text", "said"),
    [
        ("1.2.3", None, "", "usage"),
        ("v1.2.4", None, "", "worker/autotag says 1.2.3"),
        ("v1.2.3", "supabase/releases/1.2.3.json", None, "not released"),
        ("v1.2.3", "CHANGELOG.md", "# Changes\n\n## 1.2.30\n", "no section"),
        ("v1.2.3", "CHANGELOG.md", "# Changes\n\n## 1.2.3 (not released yet)\n", "still says"),
    ],
)
def test_no_notes_of_what_is_not_released(tree: Path, tag: str, path: str | None, text: str | None, said: str) -> None:
    if path and text is None:
        (tree / path).unlink()
    elif path and text:
        (tree / path).write_text(text)
    done = notes(tree, tag)
    assert done.returncode == 1
    assert said in done.stderr
