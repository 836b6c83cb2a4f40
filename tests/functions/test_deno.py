"""Deno's own checks find nothing in the edge functions."""

from __future__ import annotations

import json
import subprocess

import pytest
from deno import DENO, FUNCTIONS, NO_LOCK

from conftest import ROOT

EACH = pytest.mark.parametrize("function", ["openai-webhook", "auto_tag_asset"])


@pytest.mark.parametrize(
    "command",
    [["fmt", "--check"], ["lint", "--no-config"], ["check", "--node-modules-dir=manual", NO_LOCK, "index.ts"]],
    ids=lambda c: c[0],
)
@EACH
def test_deno_finds_nothing(function: str, command: list[str]) -> None:
    done = subprocess.run([DENO, *command], cwd=FUNCTIONS / function, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@EACH
def test_the_lock_has_the_packages_that_the_tests_run_with(function: str) -> None:
    """Each import and everything that it needs, with the version and the hash of package-lock.json."""
    installed = json.loads((ROOT / "package-lock.json").read_text())["packages"]
    imports = json.loads((FUNCTIONS / function / "deno.json").read_text())["imports"]
    lock = json.loads((FUNCTIONS / function / "deno.lock").read_text())
    assert lock["version"] == "4"
    assert sorted(lock["specifiers"]) == sorted(imports.values()) == sorted(lock["workspace"]["dependencies"])
    wanted, expected = [name.removeprefix("npm:").rpartition("@")[0] for name in lock["specifiers"]], dict[str, str]()
    for name in wanted:  # grows
        package = installed[f"node_modules/{name}"]
        expected[f"{name}@{package['version']}"] = package["integrity"]
        wanted += [needed for needed in package.get("dependencies", ()) if needed not in wanted]
    assert {name: package["integrity"] for name, package in lock["npm"].items()} == expected
    assert {name.removeprefix("npm:") for name in lock["specifiers"]} <= expected.keys()
