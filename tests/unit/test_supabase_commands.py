"""Every command of the Supabase CLI in the documents exists, with its options, in the CLI that people install."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from autotag.install.origin import push_command
from cli_tools import supabase
from conftest import ROOT

GLOBAL = {"--help", "--yes", "--workdir", "--debug", "--output", "-o"}
PLACES = ["README.md", "CONTRIBUTING.md", "docs/**/*.md", ".github/**/*.yml", "worker/autotag/**/*.py", "lab/**/*.py",
          "scripts/*", "supabase/**/*.ts", "supabase/schemas/**/*.sql", "supabase/config.toml", ".devcontainer/*"]  # fmt: skip


@pytest.fixture(scope="module")
def commands() -> dict[str, set[str]]:
    """Every command with its options. The CLI generates shell completions, so one call shows all of them."""
    script = supabase("--completions", "bash", stdout_only=True)
    parts = re.split(r"^_supabase(\w*)\(\)$", script, flags=re.MULTILINE)
    return {
        name.strip("_").replace("_", " ").replace("-", " "): set(re.findall(r"(?<![\w-])(--?[a-z][a-z-]*)", body))
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def told(text: str) -> Iterator[str]:
    """The commands in a text: the words from the CLI's name to the end of the code or sentence."""
    words = r"[a-z][a-z-]*(?![\w/.@])"
    for match in re.finditer(rf"(?<![\w/.@-])supabase((?: {words})+(?:[ =][^\s`'\"|&;()]+)*)", text):
        yield match[1].strip()


def problem(command: str, commands: dict[str, set[str]]) -> str | None:
    words = command.split()
    name = ""
    while words and f"{name} {words[0]}".strip() in commands:
        name = f"{name} {words.pop(0)}".strip()
    if not name:
        return None  # prose: "supabase stacks"
    unknown = [word for word in words if word.startswith("-") and word.partition("=")[0] not in commands[name] | GLOBAL]
    return f"{name} has no {unknown}" if unknown else None


def test_every_command_exists_with_its_options(commands: dict[str, set[str]]) -> None:
    found, wrong = set(), []
    for place in PLACES:
        for path in ROOT.glob(place):
            for command in told(path.read_text()) if path.is_file() else ():
                found.add(" ".join(command.split()[:2]))
                if said := problem(command, commands):
                    wrong.append((str(path.relative_to(ROOT)), command, said))
    assert wrong == []
    assert {"db push", "functions deploy", "secrets set", "migration up", "status -o"} <= found, "they are found at all"
    assert problem("db push --db-url x", commands), "deprecated"
    assert problem("db push --linked", commands)
    assert problem("functions deploy f --no-verify-jwt", commands) is None


def test_documents_push_to_the_linked_project() -> None:
    """Without --remote, the CLI changes the local stack and reports success."""
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for line in path.read_text().splitlines():
            if re.match(r"supabase db push", line) or "run: supabase db push" in line:
                assert "--remote" in line, (path, line)


@pytest.mark.parametrize(
    ("url", "command"),
    [
        ("postgresql://postgres:x@127.0.0.1:54322/postgres", "supabase db push"),
        ("postgresql://postgres:x@db.abcdefghijklmnopqrst.supabase.co:5432/postgres", "supabase db push --remote"),
        ("postgresql://postgres.ref:x@aws-0-eu.pooler.supabase.com:5432/postgres", "supabase db push --remote"),
        ("postgresql://postgres:x@db.example.org/postgres", 'supabase db push --remote="$DATABASE_URL"'),
    ],
)
def test_init_names_the_command_for_its_database(url: str, command: str) -> None:
    assert push_command(url) == command
