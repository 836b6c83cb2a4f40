"""Profiles as files: a written file can be read, and means the same profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autotag.cli.app import app
from autotag.db.profiles import Profile
from autotag.operate.profile_file import SETTINGS, parse_profile, read_profile, whole_profile, write_profile

PLAIN: Profile = {
    "version": 1, "own": True, "instructions": "", "language": None, "tag_count": None, "min_confidence": 0, "vocabulary_mode": "open",
    "add_parents": False, "fields": [], "created_at": None,
}  # fmt: skip
FULL: Profile = {
    **PLAIN, "instructions": 'Say "yes"\n"""\\ {no}\t—\u3000家', "language": "Deutsch", "tag_count": 7, "min_confidence": 0.25, "add_parents": True,
    "fields": [{"name": "room", "kind": "enum", "values": ['"a"', "Küche\\"], "description": "Which\u2028"}, {"name": "n", "kind": "integer"}],
}  # fmt: skip


@pytest.mark.parametrize(
    "profile", [PLAIN, FULL, {**FULL, "instructions": 'one "line" \\'}], ids=["plain", "full", "line"]
)
def test_what_is_written_is_read_again(profile: Profile) -> None:
    read = dict(whole_profile(write_profile(profile)))
    assert {name: read[name] or None for name in (*SETTINGS, "fields")} == {
        name: dict(profile)[name] or None for name in (*SETTINGS, "fields")
    }


def test_json_and_toml_name_only_what_changes(tmp_path: Path) -> None:
    (tmp_path / "p.JSON").write_text('{"tag_count": 5, "language": null}')
    (tmp_path / "p.toml").write_text('tag_count = 5\n[[fields]]\nname = "n"\nkind = "integer"')
    assert read_profile(tmp_path / "p.JSON") == {"tag_count": 5, "language": None}
    assert read_profile(tmp_path / "p.toml") == {"tag_count": 5, "fields": [{"name": "n", "kind": "integer"}]}


@pytest.mark.parametrize(
    ("text", "as_json"), [("tag_count = ", False), ("[1]", True), ("{", True), ("min_confidence = nan", False)]
)
def test_what_is_no_profile_is_said(text: str, as_json: bool) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        parse_profile(text, as_json=as_json)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["show"], "--workspace"),
        (["show", "--workspace", "w", "--all"], "--workspace"),
        (["show", "--all", "--tag-count", "5"], "takes no changes"),
        (["set", "--all"], "Name what to change"),
    ],
)
def test_a_wrong_call_is_one_sentence(arguments: list[str], advice: str) -> None:
    done: Any = CliRunner().invoke(app, ["profile", *arguments])
    assert done.exit_code == 2
    assert advice in done.output


@pytest.mark.parametrize(
    "content",
    ["min_confidence = inf", "min_confidence = [-inf]", "[[fields]]\nmin = nan", "min_confidence = 2026-01-01"],
)
def test_a_file_with_what_json_lacks_changes_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(content)
    done = CliRunner().invoke(app, ["profile", "set", "--all", "--file", str(tmp_path / "p.toml")])
    assert done.exit_code == 2
    assert "cannot be read as a profile" in done.output
    assert isinstance(done.exception, SystemExit)
