"""The exact names of all objects that autotag creates in a database, read from its own migrations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from autotag.install.adapter import TEMPLATE
from autotag.install.migrations import ADAPTER_STEPS, migrations
from autotag.install.written import HOST_ADAPTER, HOST_BASELINE

_MADE = re.compile(r"^create (?:or replace )?(?P<kind>[a-z]+) (?P<name>(?:autotag|public)\.\w+)", re.MULTILINE)
_ENUM = re.compile(r" as enum \((.*?)\);", re.DOTALL)
#: A column of `autotag.keys`, which has the type of a project's ids.
_KEY = re.compile(r"autotag\.keys\.(\w+)%type")
_MODES = ("in", "inout", "variadic")
#: As Postgres prints them.
_TYPES = {"timestamptz": "timestamp with time zone", "int": "integer", "bool": "boolean"}


@dataclass(frozen=True)
class Own:
    """The objects that migrations create, each with its schema.

    Attributes:
        functions: ``autotag.seal(uuid,text[])``. The type of a key is ``autotag.keys.asset_ids%type``.
        relations: tables, views and sequences.
        types: enums with their labels; other types and domains have none.
    """

    functions: set[str] = field(default_factory=set)
    relations: set[str] = field(default_factory=set)
    types: dict[str, list[str]] = field(default_factory=dict)

    def enums(self) -> dict[str, list[str]]:
        """The enums in ``public``, by name without schema."""
        found = {name.removeprefix("public."): labels for name, labels in self.types.items() if labels}
        return {name: labels for name, labels in found.items() if "." not in name}

    def signatures(self, keys: Mapping[str, str]) -> set[str]:
        """The signatures of its functions, with the types of a project's ids (the columns of `autotag.keys`)."""
        return {_KEY.sub(lambda key: keys.get(key[1], key[0]), one) for one in self.functions}


@cache
def of_adapter() -> Own:
    """The objects that the adapter and its steps create."""
    return _read([TEMPLATE.read_text("utf-8"), *ADAPTER_STEPS.values()])


@cache
def of_engine() -> Own:
    """The objects that all releases create after the adapter."""
    return _read(one.sql for one in migrations() if one.name not in (HOST_ADAPTER, HOST_BASELINE))


def _read(texts: Iterable[str]) -> Own:
    own = Own()
    for text in texts:
        for found in _MADE.finditer(text):
            kind, name = found["kind"], found["name"]
            if kind == "function":
                own.functions.add(f"{name}({','.join(_types(text[found.end() :]))})")
            elif kind in ("table", "view", "sequence"):
                own.relations.add(name)
            elif kind in ("type", "domain"):
                labels = _ENUM.match(text, found.end())
                own.types[name] = re.findall(r"'([^']*)'", labels[1]) if labels else []
    return own


def _types(text: str) -> list[str]:
    """The types of a function's arguments, from the text after its name."""
    parts, depth = [""], 0
    for sign in re.sub(r"--.*", "", text[:5000]):
        depth += {"(": 1, ")": -1}.get(sign, 0)
        if depth == 0:
            break
        if sign == "," and depth == 1:
            parts.append("")
        elif (sign, depth) != ("(", 1):
            parts[-1] += sign
    found = []
    for part in parts:
        words = re.split(r"\s+(?:default|=)\s", part.strip())[0].split()
        mode = words.pop(0) if words and words[0] in (*_MODES, "out") else ""
        if words and mode != "out":
            kind = " ".join(words[1:] or words)
            base = kind.removesuffix("[]")
            found.append(_TYPES.get(base, base) + kind[len(base) :])
    return found
