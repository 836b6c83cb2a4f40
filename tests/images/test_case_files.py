"""Unusual but valid files: the model sees what a person would see, or the user is told what the file is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autotag.errors import TaggingError
from autotag.images.prepare import measure, prepare
from images.judging import judge

CASES = Path(__file__).parent / "cases"
EXPECTED = json.loads((CASES / "expected.json").read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_case_file(name: str) -> None:
    expected = EXPECTED[name]
    if expected["expect"] == "tagged":
        assert measure(CASES / name, 512).need < 300_000_000
        assert not judge(prepare(CASES / name, 512, 300_000_000).jpeg, expected)
    else:
        for read in (lambda: measure(CASES / name, 512), lambda: prepare(CASES / name, 512, 300_000_000)):
            with pytest.raises(TaggingError) as caught:
                read()
            assert (caught.value.kind, caught.value.code) == ("image", expected["expect"])
            assert expected["names"] in caught.value.message
            assert caught.value.message.startswith("This is a")


def test_every_case_is_there() -> None:
    assert {path.name for path in CASES.iterdir()} == {*EXPECTED, "expected.json"}


def test_what_is_recorded() -> None:
    notes = {
        name: prepare(CASES / name, 512, 300_000_000).notes for name in EXPECTED if EXPECTED[name]["expect"] == "tagged"
    }
    assert 0.95 <= notes.pop("last-permille-missing.jpg")["truncated"] < 1
    assert notes.pop("chat-screenshot-1080x30000.png") == {"pieces": 5}
    assert not any(notes.values()), "nothing is said of ordinary files"
