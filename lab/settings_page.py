"""Writes docs/settings.md from the settings themselves: python -m lab.settings_page > docs/settings.md"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic.fields import FieldInfo

from autotag.config import Settings, environment_names
from lab.schema import SCHEMAS

COLUMN = re.compile(
    r"^  (?P<name>\w+) (?P<type>double precision|\w+) not null default (?P<default>'[^']*'|\S+?)"
    r"(?: check \((?P<check>.*?)\))?,?(?:\s+-- (?P<note>.*))?$"
)
HEAD = """# Settings

This page is made from the settings themselves (`python -m lab.settings_page`); a test keeps it so.

## What is decided: columns of `autotag.settings`

`update autotag.settings set chunk_delay = '1 s';` holds from the next decision on. Workers notice what is asked of the
model at their next claim; nothing has to be restarted. What a model costs and how it is asked is a row of
`autotag.models` ([models.md](models.md)). What a workspace may do is `max_requests` and `max_units` in
`public.workspace_rate_limits` (null: the defaults below), the provider's limits are in `autotag.provider_limits`
([providers.md](providers.md)), and what may be used by whom is in `autotag.quotas`.
"""
ENVIRONMENT = """
## What differs from worker to worker: its environment, or a `.env` file

| variable | default | what |
|---|---|---|
"""
OTHER = """
Traces are configured as everywhere with OpenTelemetry: `OTEL_EXPORTER_OTLP_ENDPOINT` turns them on
(`pip install 'supabase-autotag[otel]'`), `OTEL_SERVICE_NAME` names them.
"""


def main() -> str:
    """The page."""
    rows = "\n".join(f"| {' | '.join(_environment(name, field))} |" for name, field in Settings.model_fields.items())
    return HEAD + "".join(_columns()) + ENVIRONMENT + rows + "\n" + OTHER


def _columns() -> Iterator[str]:
    """The table's columns in groups, as the source has them: a blank line and a comment begin a group."""
    body = (
        (SCHEMAS / "tables" / "settings.sql")
        .read_text()
        .split("create table autotag.settings (", 1)[1]
        .split("\n);", 1)[0]
    )
    comment: list[str] = []
    begins = False
    for line in body.splitlines()[1:]:
        if not line.strip():
            begins = True
        elif line.startswith("  -- ") and begins:
            title, begins = line.removeprefix("  -- "), False
            yield f"\n**{title[0].upper()}{title[1:]}**\n\n| column | default | must be | |\n|---|---|---|---|\n"
        elif line.startswith("  -- "):
            comment.append(line.removeprefix("  -- "))
        elif (match := COLUMN.match(line)) and match["name"] != "id":
            said = " ".join(comment)
            kind = "" if match["type"] in ("text", "boolean", "interval") else f"{match['type']} "
            must = (match["check"] or "").replace("|", "\\|")
            note = "; ".join(part for part in (said.rstrip(".") if match["note"] else said, match["note"]) if part)
            default, must = match["default"].strip("'"), f"`{must}`" if must else ""
            yield f"| `{match['name']}` | `{default}` | {kind}{must} | {note} |\n"
            comment = []


def _environment(name: str, field: FieldInfo) -> tuple[str, str, str]:
    names = " or ".join(f"`{one}`" for one in environment_names(name, field))
    default = field.default
    if field.is_required():
        shown = "required"
    elif default in (None, frozenset()):
        shown = ""
    else:
        shown = f"`{default:,}`" if isinstance(default, int) else f"`{default}`"
    return names, shown, field.description or ""


if __name__ == "__main__":
    print(main(), end="")
