"""A vocabulary as a file: CSV as spreadsheets write it, a list with one tag a line, or the JSON of ``export``."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from autotag.db.vocabulary import Entry
from autotag.texts import FORMULA, clean_text

COLUMNS = ("tag", "aliases", "description", "parent")
#: Other names of the first column, by which a header is recognised.
HEADERS = ("tag", "tags", "name")
MAX_BYTES = 50_000_000
_SPLIT = re.compile(r"(?<!\\)((?:\\\\)*)[|;]")
_ESCAPED = re.compile(r"\\([|;\\])")


class FileError(ValueError):
    """A file that is no vocabulary; the message says where and why."""


@dataclass(frozen=True)
class VocabularyFile:
    """What a file contains.

    Attributes:
        entries: its tags.
        places: where each of them is: "line 3" or "entry 3".
        encoding: how its bytes were read; None: as Unicode, which is certain.
    """

    entries: Sequence[Entry]
    places: Sequence[str]
    encoding: str | None = None

    def find(self, name: str) -> list[str]:
        """The places of the entries with a name, compared as the database does for most (``autotag.tag_key``)."""
        return [place for entry, place in zip(self.entries, self.places, strict=True)
                if name in {_key(text) for text in (entry["tag"], *(entry.get("aliases") or ()))}]  # fmt: skip


def _key(text: str) -> str:
    return re.sub(r"[^\w#.+]+", " ", text.lower().replace("'", "").replace("_", " ")).strip()


def read_vocabulary(data: bytes) -> VocabularyFile:
    """Reads a file.

    Raises:
        FileError: it is none of these.
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
            if '"tag"' in text:  # otherwise a tag begins with a bracket
                raise FileError(f"The file is not JSON: {error}.") from None
    entries: list[Entry] = []
    places: list[str] = []
    for line, entry in _read_csv(text):
        entries.append(entry)
        places.append(f"line {line}")
    if not entries:
        raise FileError("The file has no tag.")
    return VocabularyFile(entries, places, encoding)


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
    """The character that separates the first line's cells: the most frequent one outside of quotes."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    plain = re.sub(r'"(?:[^"]|"")*"', "", first)
    return max(",;\t", key=plain.count)


def _header(row: Sequence[str], line: int) -> Sequence[str] | None:
    """The columns that a first row names; None: it is no header.

    Raises:
        FileError: it names one that is unknown, or one twice.
    """
    names = [cell.strip().lower() for cell in row]
    while names and not names[-1]:
        names.pop()
    if not names or not (names[0] in HEADERS or ("tag" in names and set(names) <= set(COLUMNS))):
        return None
    names = ["tag" if name in HEADERS else "aliases" if name == "alias" else name for name in names]
    unknown = [name for name in names if name not in COLUMNS]
    if unknown:
        raise FileError(f"Line {line}: the column {unknown[0]!r} is none of {', '.join(COLUMNS)}.")
    if len(set(names)) < len(names):
        raise FileError(f"Line {line}: a column is there twice.")
    return names


def _entry(row: Sequence[str], columns: Sequence[str], line: int) -> Entry:
    """A row as an entry, which lacks the columns that the file lacks."""
    cells = [_unescape(clean_cell(cell)) for cell in row]
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


def clean_cell(text: str) -> str:
    """A cell without invisible characters; otherwise as it is, also where compatible characters look alike (½)."""
    return text.strip() if text.isascii() and text.isprintable() else _visible(text)


def _visible(text: str) -> str:
    return " ".join("".join(c if clean_text(f"a{c}a") != "aa" else "" for c in text).split())


def split_aliases(text: str) -> list[str]:
    """The aliases in a cell, separated by ``|`` or ``;``; a backslash before one of these makes it part of an alias."""
    parts = _SPLIT.sub("\\1\n", text).split("\n")
    return [alias for part in parts if (alias := _ESCAPED.sub(r"\1", part).strip())]


def join_aliases(aliases: Iterable[str]) -> str:
    """The inverse of `split_aliases`."""
    return "|".join(re.sub(r"([|;\\])", r"\\\1", alias) for alias in aliases)


def write_csv(entries: Iterable[Mapping[str, Any]]) -> str:
    """Entries as CSV with a header, which `read_vocabulary` reads again. No spreadsheet takes a cell for a formula."""
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
