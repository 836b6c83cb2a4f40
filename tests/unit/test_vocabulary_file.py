"""Files of vocabularies: what spreadsheets write can be read, and so can what autotag writes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotag.operate.vocabulary_file import FileError, read_vocabulary, write_csv
from autotag.texts import visible_text


@pytest.mark.parametrize(
    ("data", "commas"),
    [(b"tag;aliases\ncat;kitty|puss\ngrass;field, meadow\n", ("line 3", "field, meadow")),
     (b'grass,"field, meadow|green",x\n', ("line 1", "field, meadow")), (b"grass;field|meadow\n", None), (b"a, b;c\n", None),
     (b'[{"tag": "x", "aliases": ["a, b"]}]', None)],
)  # fmt: skip
def test_an_alias_that_may_be_several_is_noticed(data: bytes, commas: tuple[str, str] | None) -> None:
    assert read_vocabulary(data).commas == commas


HEADED = "tag,aliases,description,parent\n"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"cat\ndog\n", [{"tag": "cat"}, {"tag": "dog"}]),
        (b"cat\r\n\r\ndog", [{"tag": "cat"}, {"tag": "dog"}]),
        (b"cat\rdog", [{"tag": "cat"}, {"tag": "dog"}]),
        (b"Tag\ncat\n", [{"tag": "cat"}]),
        (b"parent;tag\nanimal;cat\n", [{"parent": "animal", "tag": "cat"}]),
        (b"sep=;\r\ntag;parent\r\ncat;animal\r\n", [{"tag": "cat", "parent": "animal"}]),
        ("\ufefftag\nStraße\n".encode(), [{"tag": "Straße"}]),
        ("tag\nStraße\n".encode("utf-16"), [{"tag": "Straße"}]),
        ("tag\nStraße\n".encode("utf-16-le"), [{"tag": "Straße"}]),
        ("tag\nStraße\n".encode("utf-16-be"), [{"tag": "Straße"}]),
        ("tag\nStraße\n".encode("cp1252"), [{"tag": "Straße"}]),
        (b"cat,kitty|pussy;puss,soft,animal\n",
         [{"tag": "cat", "aliases": ["kitty", "pussy", "puss"], "description": "soft", "parent": "animal"}]),
        (b"cat\tkitty\n", [{"tag": "cat", "aliases": ["kitty"]}]),
        (b'"a ""b"", c",,\n', [{"tag": 'a "b", c', "aliases": [], "description": None}]),
        (b'cat,"one\\|two|three"\n', [{"tag": "cat", "aliases": ["one|two", "three"]}]),
        (b'"two\nlines"\n', [{"tag": "two lines"}]),
        (b"[x]\n", [{"tag": "[x]"}]),
        ("cat\u200b\n\u202edog\n".encode(), [{"tag": "cat"}, {"tag": "dog"}]),
        (b'[{"tag": "cat", "general": true}]', [{"tag": "cat"}]),
        (b"'=1+1\n", [{"tag": "=1+1"}]),
        ("Schlagwort;Synonyme;Beschreibung;Oberbegriff\r\nAuto;Wagen|Pkw;rot, schnell;Fahrzeug\r\n".encode("cp1252"),
         [{"tag": "Auto", "aliases": ["Wagen", "Pkw"], "description": "rot, schnell", "parent": "Fahrzeug"}]),
        ("Schlagwort\tBeschreibung\r\nStraße\tbreit, lang; grau\r\n".encode("utf-16"),
         [{"tag": "Straße", "description": "breit, lang; grau"}]),  # Excel's “Unicode text”
        ("\ufeffMot clé,Synonymes\nvoiture,auto\n".encode(), [{"tag": "voiture", "aliases": ["auto"]}]),
        ("palabra_clave;padre\ncoche;vehículo\n".encode(), [{"tag": "coche", "parent": "vehículo"}]),
        (b"Auto;;rot, schnell, teuer\nHaus;;gross\n",
         [{"tag": "Auto", "aliases": [], "description": "rot, schnell, teuer"}, {"tag": "Haus", "aliases": [], "description": "gross"}]),
        (b"cat,alias\n", [{"tag": "cat", "aliases": ["alias"]}]),
    ],
)  # fmt: skip
def test_files_that_people_have(data: bytes, expected: object) -> None:
    assert list(read_vocabulary(data).entries) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no tag"), (b"tag,aliases\n", "no tag"), (b"\x89PNG\r\n\x1a\n\0\0\0\r", "binary"), (b"cat\0", "binary"),
        (b"tag,colour\ncat,red\n", "Line 1: the column 'colour'"), (b"tag,tag\nx,y\n", "twice"),
        (b"Oberbegriff;Synonyme\nx;y\n", "no column is called tag"), (b"Schlagwort;Farbe\nx;rot\n", "column 'farbe'"),

        (b'cat\n"dog\n', "Line 2"), (b"tag,parent\n\n,animal\n", "Line 3 has no tag"), (b"a,b,c,d,e\n", "Line 1 has 5 cells"),
        (b'[{"tag": "cat"}, {"name": 5}]', "Entry 2"), (b'[{"tag": "cat"]', "not JSON"), (b"[]", "no tag"),
        (b"\xff\xfea", "cannot be read"),
    ],
)  # fmt: skip
def test_what_is_no_vocabulary_is_refused_with_its_place(data: bytes, message: str) -> None:
    with pytest.raises(FileError, match=message):
        read_vocabulary(data)


WORD = (
    st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=15)
    .map(visible_text)
    .filter(bool)
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.fixed_dictionaries({
    "tag": WORD, "aliases": st.lists(WORD, max_size=3), "description": st.none() | WORD, "parent": st.none() | WORD,
}), min_size=1, max_size=5))  # fmt: skip
def test_what_is_written_is_read_again(entries: list[dict[str, object]]) -> None:
    text = write_csv(entries)
    assert list(read_vocabulary(text.encode()).entries) == entries
    for line in text.splitlines()[1:]:
        assert not line.lstrip('"').startswith(("=", "+", "-", "@")), "no spreadsheet runs it"


@pytest.mark.parametrize(
    ("data", "first"),
    [
        (b"avainsana;synonyymit\nauto;kulkuneuvo\n", "avainsana"),  # a header in a language that is not known
        (b"tag;aliases\nauto;x\n", None), (b"\n\nauto\ntalo\n", None), (b'[{"tag": "a", "parent": "b"}]', None),
    ],
)  # fmt: skip
def test_a_first_line_that_may_be_a_header_is_named(data: bytes, first: str | None) -> None:
    assert read_vocabulary(data).first_row == first
