"""A vocabulary as a file: CSV from spreadsheets, a list with one tag per line, or the JSON of ``export``."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from autotag.db.vocabulary import Entry
from autotag.texts import FORMULA, clean_text, visible_text

COLUMNS = ("tag", "aliases", "description", "parent")
#: Names of the columns in the languages of common spreadsheets. They identify a header.
NAMES = {
    "tag": """tag tags name keyword keywords label labels term schlagwort schlagwörter schlagworte stichwort stichwörter
        begriff mot-clé mots-clés étiquette etiqueta etiquetas palabra-clave palavra-chave etichetta parola-chiave
        trefwoord trefwoorden nyckelord emneord słowo-kluczowe ключевое-слово тег タグ 标签 標籤 태그""",
    "aliases": """aliases alias synonym synonyms synonyme synonymes sinónimo sinónimos sinônimo sinônimos sinonimo
        sinonimi synoniem synoniemen synonymer synonimy синонимы 同義語 同义词 동의어""",
    "description": """description beschreibung erklärung descripción descrição descrizione beschrijving beskrivning
        beskrivelse opis описание 説明 描述 설명""",
    "parent": """parent parents oberbegriff übergeordnet padre pai genitore overkoepelend överordnad overordnet
        nadrzędny родитель 親 父级 상위""",
}
HEADERS = {name: column for column, names in NAMES.items() for name in names.split()}
MAX_BYTES = 50_000_000
_SPLIT = re.compile(r"(?<!\\)((?:\\\\)*)[|;]")
_ESCAPED = re.compile(r"\\([|;\\])")


class FileError(ValueError):
    """The file is not a vocabulary. The message says where and why."""


@dataclass(frozen=True)
class VocabularyFile:
    """What a file contains.

    Attributes:
        entries: its tags.
        places: where each of them is: "line 3" or "entry 3".
        encoding: the guessed encoding; None: Unicode, which is certain.
        first_row: the first line, if the file has several columns and no known header; otherwise None.
        commas: the first alias with a comma, which may be meant as several aliases, and its place.
    """

    entries: Sequence[Entry]
    places: Sequence[str]
    encoding: str | None = None
    first_row: str | None = None
    commas: tuple[str, str] | None = None

    def find(self, name: str) -> list[str]:
        """The places of the entries with a name. Most names compare like ``autotag.tag_key`` in the database."""
        return [place for entry, place in zip(self.entries, self.places, strict=True)
                if name in {_key(text) for text in (entry["tag"], *(entry.get("aliases") or ()))}]  # fmt: skip


def _key(text: str) -> str:
    return re.sub(r"[^\w#.+]+", " ", clean_text(text).lower().replace("'", "").replace("_", " ")).strip()


def read_vocabulary(data: bytes) -> VocabularyFile:
    """Reads a file.

    Raises:
        FileError: the file has none of these forms.
    """
    if len(data) > MAX_BYTES:
        raise FileError("The file has more than 50 MB.")
    text, encoding = _decode(data)
    if "\0" in text:
        raise FileError("The file contains binary data.")
    if text.lstrip().startswith("["):
        try:
            return _read_json(text)
        except json.JSONDecodeError as error:
            if '"tag"' in text:  # otherwise it is a list whose first tag begins with a bracket
                raise FileError(f"The file is not JSON: {error}.") from None
    entries: list[Entry] = []
    places: list[str] = []
    for line, entry in _read_csv(text):
        entries.append(entry)
        places.append(f"line {line}")
    if not entries:
        raise FileError("The file has no tag.")
    alone = len(entries[0]) == 1
    headed = places[0] != f"line {_first_line(text)}"
    commas = next(((place, alias) for entry, place in zip(entries, places, strict=True)
                   for alias in entry.get("aliases") or () if "," in alias), None)  # fmt: skip
    return VocabularyFile(entries, places, encoding, None if alone or headed else entries[0]["tag"], commas)


def _first_line(text: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if line.strip())


def _decode(data: bytes) -> tuple[str, str | None]:
    """The text, and the encoding if it is a guess."""
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            return _strictly(data, encoding), None
    zeros = data[:1000].count(0)
    if zeros > len(data[:1000]) / 4:  # Latin text as UTF-16 without its mark: every second byte is 0
        return _strictly(data, "utf-16-le" if data[1:2] == b"\0" else "utf-16-be"), None
    try:
        return data.decode("utf-8"), None
    except UnicodeDecodeError:
        return _strictly(data, "cp1252"), "Windows-1252"  # what Excel writes in Western Europe and America


def _strictly(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        raise FileError("The file's text cannot be read; save it as UTF-8 (in Excel: CSV UTF-8).") from None


def _read_json(text: str) -> VocabularyFile:
    parsed: Any = json.loads(text)
    if not isinstance(parsed, list) or not parsed:
        raise FileError("The file has no tag.")
    for number, entry in enumerate(parsed, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("tag"), str):
            raise FileError(f"Entry {number} has no tag.")
    known = [{name: value for name, value in entry.items() if name in (*COLUMNS, "uses")} for entry in parsed]
    return VocabularyFile(cast("list[Entry]", known), [f"entry {number}" for number in range(1, len(known) + 1)])


def _read_csv(text: str) -> Iterator[tuple[int, Entry]]:
    """Each entry with the line where it begins."""
    skipped = 0
    if re.match(r"sep=.\r?\n", text, re.IGNORECASE):  # Excel's own line
        delimiter = text[4]
        text, skipped = text.split("\n", 1)[1], 1
    else:
        delimiter = _delimiter(text)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: Sequence[str] | None = None
    while True:
        line = rows.line_num + 1 + skipped
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise FileError(f"Line {line}: {error}.") from None
        if row is None:
            return
        if not any(cell.strip() for cell in row):
            continue
        if columns is None:
            columns = _header(row, line)
            if columns:
                continue
            columns = COLUMNS
        yield line, _entry(row, columns, line)


def _delimiter(text: str) -> str:
    """The character that separates cells. Outside of quotes, all of the first lines have the same number of it. If that
    is true of several characters or of none, it is the one that is most frequent in the first line, because texts
    contain commas, too."""
    plain = re.sub(r'"(?:[^"]|"")*"', "", text[:20_000])
    lines = [line for line in plain.splitlines() if line.strip()][:50]
    if not lines:
        return ","
    even = [one for one in ",;\t" if lines[0].count(one) and len({line.count(one) for line in lines}) == 1]
    return max(even or ",;\t", key=lambda one: (one == "\t" and one in lines[0], lines[0].count(one)))


def _header(row: Sequence[str], line: int) -> Sequence[str] | None:
    """The columns that a first row names; None: the row is not a header.

    Raises:
        FileError: it names an unknown column, or one column twice.
    """
    cells = [cell.strip().lower() for cell in row]
    while cells and not cells[-1]:
        cells.pop()
    names = [HEADERS.get(re.sub(r"[\s_]+", "-", cell), "") for cell in cells]
    if not any(names) or not (names[0] == "tag" or len([name for name in names if name]) > 1):
        return None  # a single known word in a later column may be an alias or a description
    if "" in names:
        unknown = cells[names.index("")]
        raise FileError(
            f"Line {line}: the column {unknown!r} is none of {', '.join(COLUMNS)}; name each column as one of these."
        )
    if "tag" not in names:
        raise FileError(f"Line {line}: no column is called tag.")
    if len(set(names)) < len(names):
        raise FileError(f"Line {line}: a column is there twice.")
    return names


def _entry(row: Sequence[str], columns: Sequence[str], line: int) -> Entry:
    """A row as an entry. Columns that the file lacks are missing in the entry, too."""
    cells = [_unescape(visible_text(cell)) for cell in row]
    if any(cells[len(columns) :]):
        raise FileError(
            f"Line {line} has {len(cells)} cells; at most {len(columns)} are possible ({', '.join(columns)})."
            " Put quotes around a text that contains the separator."
        )
    named = dict(zip(columns, cells, strict=False))
    if not named.get("tag"):
        raise FileError(f"Line {line} has no tag.")
    entry: Entry = {"tag": named["tag"]}
    if "aliases" in named:
        entry["aliases"] = split_aliases(named["aliases"])
    if "description" in named:
        entry["description"] = named["description"] or None
    if "parent" in named:
        entry["parent"] = named["parent"] or None
    return entry


def split_aliases(text: str) -> list[str]:
    """The aliases in a cell, separated by ``|`` or ``;``; a backslash before one of these makes it part of an alias."""
    parts = _SPLIT.sub("\\1\n", text).split("\n")
    return [alias for part in parts if (alias := _ESCAPED.sub(r"\1", part).strip())]


def join_aliases(aliases: Iterable[str]) -> str:
    """The inverse of `split_aliases`."""
    return "|".join(re.sub(r"([|;\\])", r"\\\1", alias) for alias in aliases)


def write_csv(entries: Iterable[Mapping[str, Any]]) -> str:
    """Entries as CSV with a header, which `read_vocabulary` can read. Spreadsheets do not run its cells as formulas."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for entry in entries:
        cells = (entry["tag"], join_aliases(entry["aliases"] or ()), entry["description"] or "", entry["parent"] or "")
        writer.writerow([_escape(cell) for cell in cells])
    return out.getvalue()


def _escape(cell: str) -> str:
    return f"'{cell}" if cell.lstrip("'").startswith(FORMULA) else cell


def _unescape(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(FORMULA) else cell
