"""Generates docs/settings.md from the settings: python -m lab.settings_page > docs/settings.md"""

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

This page is generated from the settings (`python -m lab.settings_page`); a test checks that it is up to date.

## Columns of `autotag.settings`

A change takes effect with the next decision, for example `update autotag.settings set chunk_delay = '1 s';`. Workers
read the settings of the question (model, effort, language and so on) with their next claim. No restart is needed.

Other tables have the rest: `autotag.models` the prices and request forms of models ([models.md](models.md)),
`autotag.provider_limits` the provider's limits ([providers.md](providers.md)), `public.workspace_rate_limits` the
limits of one workspace (`max_requests` and `max_units`; null: the defaults below), and `autotag.quotas` the quotas.
"""
ENVIRONMENT = """
## Environment variables of a worker

A worker also reads them from a `.env` file.

| variable | default | meaning |
|---|---|---|
"""
OTHER = """
Traces use OpenTelemetry's standard variables: `OTEL_EXPORTER_OTLP_ENDPOINT` turns them on (they need
`pip install 'supabase-autotag[otel]'`), and `OTEL_SERVICE_NAME` names the service.
"""


def main() -> str:
    """The text of the page."""
    rows = "\n".join(f"| {' | '.join(_environment(name, field))} |" for name, field in Settings.model_fields.items())
    return HEAD + "".join(_columns()) + ENVIRONMENT + rows + "\n" + OTHER


def _columns() -> Iterator[str]:
    """The table's columns in the source's groups. A blank line followed by a comment starts a group."""
    body = (
        (SCHEMAS / "tables" / "settings.sql")
        .read_text()
        .split("create table autotag.settings (", 1)[1]
        .split("\n);", 1)[0]
    )
    comment: list[str] = []
    starts_group = False
    for line in body.splitlines()[1:]:
        if not line.strip():
            starts_group = True
        elif line.startswith("  -- ") and starts_group:
            title, starts_group = line.removeprefix("  -- "), False
            yield f"\n**{title[0].upper()}{title[1:]}**\n\n| column | default | must be | |\n|---|---|---|---|\n"
        elif line.startswith("  -- "):
            comment.append(line.removeprefix("  -- "))
        elif (match := COLUMN.match(line)) and match["name"] != "id":
            comment_text = " ".join(comment)
            kind = "" if match["type"] in ("text", "boolean", "interval") else f"{match['type']} "
            condition = (match["check"] or "").replace("|", "\\|")
            note = "; ".join(
                part for part in (comment_text.rstrip(".") if match["note"] else comment_text, match["note"]) if part
            )
            default, condition = match["default"].strip("'"), f"`{condition}`" if condition else ""
            yield f"| `{match['name']}` | `{default}` | {kind}{condition} | {note} |\n"
            comment = []


def _environment(name: str, field: FieldInfo) -> tuple[str, str, str]:
    names = " or ".join(f"`{variable}`" for variable in environment_names(name, field))
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
