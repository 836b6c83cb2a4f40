"""autotag's migrations in a project's folder. They belong to the project, which may have edited them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotag.install.adapter import FUNCTION, hash_body
from autotag.install.answers import HostError
from autotag.install.facts import is_own_name
from autotag.install.quoting import read_literal
from autotag.texts import name_some

MIGRATION_FILE = re.compile(r"(?P<version>\d{14})_(?P<name>\w+)\.sql")
HOST_BASELINE = "host_baseline"
HOST_ADAPTER = "host_adapter"


@dataclass(frozen=True)
class Written:
    """A migration of autotag in a project's folder.

    Attributes:
        name: without ``autotag_``.
        version: its place in the order, 14 digits.
        path: its file.
    """

    name: str
    version: str
    path: Path

    @property
    def sql(self) -> str:
        """The unchanged text of the file.

        Raises:
            HostError: it is not UTF-8.
        """
        try:
            return self.path.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise HostError(
                f"{self.path.name} is not UTF-8 (byte {error.start}); save it as UTF-8, as supabase db push needs it."
            ) from None


def written_migrations(folder: Path | None) -> dict[str, Written]:
    """autotag's migrations in a folder, in order, by name. Empty for autotag's own checkout, which is not a project.

    Raises:
        HostError: two files are the same migration, for example after a merge of two branches.
    """
    found: dict[str, Written] = {}
    for path in sorted(folder.glob("*.sql")) if folder else ():
        match = MIGRATION_FILE.fullmatch(path.name)
        if match and is_own_name(match["name"]):
            name = match["name"].removeprefix("autotag_")
            if name in found:
                raise HostError(
                    f"{found[name].path.name} and {path.name} are both autotag's {name}; delete the one that the"
                    " database does not have (supabase migration list shows it), or the one with the wrong answers."
                )
            found[name] = Written(name, match["version"], path)
    return {} if HOST_BASELINE in found else found


def check_versions(written: Mapping[str, Written], applied: Mapping[str, str]) -> None:
    """Refuses files of migrations that the database has under other versions, as `supabase db push` would.

    Args:
        written: the files of the project.
        applied: the migrations in the database, name -> version.

    Raises:
        HostError: there is such a file. The message says how to rename it.
    """
    for name, file in written.items():
        version = applied.get(name)
        if version not in (None, file.version):
            raise HostError(
                f"The database has {name} as version {version}, and the project's folder as {file.path.name}, so"
                f" supabase db push refuses both; rename the file to {version}_autotag_{name}.sql if it is what the"
                " database has."
            )


def recorded_answers(adapter: str) -> dict[str, Any] | None:
    """The record of `autotag.adapter_answers` in an adapter's text; None: it has none."""
    body = next((found["body"] for found in FUNCTION.finditer(adapter) if found["name"] == "adapter_answers"), "")
    match = re.fullmatch(r"\s*select (.*)::jsonb\s*", body, re.DOTALL)
    try:
        found = json.loads(read_literal(match[1])) if match else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def edited_functions(adapter: str, answers: Mapping[str, Any]) -> list[str]:
    """The functions in an adapter's text that differ from what autotag wrote."""
    bodies = {found["name"]: hash_body(found["body"]) for found in FUNCTION.finditer(adapter)}
    return [f"autotag.{name}" for name, wrote in answers["functions"].items() if bodies.get(name) != wrote]


def check_answers(file: Written, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses answers that differ from those in the file of an unapplied adapter, because the file is never
    overwritten.

    Args:
        file: of that adapter.
        recorded: the answers that it records.
        now: the record that this version would write for the current answers.

    Raises:
        HostError: they differ. The message names what differs, and what to do.
    """
    before, after = ({**of["choices"], **{n: v for n, v in of.items() if n not in ("choices", "functions")}}
                     for of in (recorded, now))  # fmt: skip
    other = [
        f"{name.replace('_', ' ')}: {_shown(before.get(name))} in the file, {_shown(after.get(name))} now"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]
    if other:
        raise HostError(
            f"{file.path.name} is there and holds other answers ({name_some(other)}). Nothing was written: delete that"
            " file and run this again with all options, or edit it and leave these options out."
        )


def _shown(value: object) -> str:
    return "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)
