"""The documents agree with the code, and their links lead to existing places."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conftest import ROOT
from lab import settings_page

DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")


def test_the_settings_page_is_made_from_the_settings() -> None:
    page = settings_page.main()
    assert (ROOT / "docs" / "settings.md").read_text() == page, "python -m lab.settings_page > docs/settings.md"
    assert page.count("\n| `") > 60
    assert " |  |\n" not in page.split("## Environment")[0], "every column says what it is for"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target, anchor in LINK.findall(document.read_text()):
        path = (document.parent / target).resolve() if target else document
        assert path.exists(), f"{document.name} links to {target}, which is not there"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{document.name} links to {target}#{anchor}, which has no such heading"


def test_every_picture_is_shown_in_a_document() -> None:
    text = " ".join(document.read_text() for document in DOCUMENTS)
    for picture in [*(ROOT / "docs").rglob("*.png"), *(ROOT / "docs").rglob("*.svg")]:
        assert picture.name in text, f"no document shows {picture.name}"


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "contributing").glob("*.md")), ids=lambda path: path.stem)
def test_the_files_that_a_page_for_contributors_names_are_there(page: Path) -> None:
    named = set(re.findall(r"`((?:\./)?[\w.*…-]+(?:/[\w.*…-]+)+(?:\.\w+)?)`", page.read_text()))
    assert named
    for name in named - {"docs/"}:
        places = (ROOT, ROOT / "supabase" / "schemas", ROOT / "worker" / "autotag" / "install", ROOT / "tests")
        pattern = name.removeprefix("./").replace("…", "*").replace("X.Y.Z", "*").removesuffix("/")
        made_by_a_release = "unreleased" in name or "X.Y.Z" in name
        assert made_by_a_release or any(True for place in places for _ in place.glob(pattern)), f"{page.name}: {name}"


def test_what_the_glossary_names_is_there() -> None:
    source = [*(ROOT / "supabase" / "schemas").rglob("*.sql"), *(ROOT / "worker").rglob("*.py")]
    words = set(re.findall(r"\w+", " ".join(path.read_text() for path in source)))
    rows = [line for line in (ROOT / "docs" / "glossary.md").read_text().splitlines() if line.startswith("| **")]
    assert len(rows) > 60
    for row in rows:
        for name in re.findall(r"`([^`]+)`", row.rsplit("|", 2)[1]):
            if "/" in name or name.endswith((".py", ".sql")):
                places = (ROOT, ROOT / "worker" / "autotag", ROOT / "supabase" / "schemas")
                assert any((place / name).exists() for place in places), name
            else:
                assert name.split(".")[-1] in words, name
