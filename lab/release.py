"""``scripts/release``: the migrations, made from the source."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

from autotag.install.adapter import render
from autotag.install.host import Host
from autotag.install.migrations import TEMPLATE
from lab import schema

FIRST = 20261128000001  # the version of the first file; each release is one more
VERSION = re.compile(r"\d+\.\d+\.\d+")


def expected() -> dict[Path, str]:
    """The files that are made again with every change of the source, and what has to be in them.

    Raises:
        ReleaseError: changes of tables have no step.
    """
    adapter = render(TEMPLATE.read_text(), Host())
    baseline = (schema.SCHEMAS / "host" / "baseline.sql").read_text()
    made = {
        schema.SCHEMAS / "host" / "adapter.sql": adapter,
        schema.MIGRATIONS / f"{FIRST}_autotag_host_baseline.sql": baseline,
        schema.MIGRATIONS / f"{FIRST + 1}_autotag_host_adapter.sql": adapter,
    }
    if pending := schema.next_migration(schema.UNRELEASED):
        made[unreleased()] = pending
    return made


def unreleased() -> Path:
    """The file of what is not released yet."""
    return schema.MIGRATIONS / f"{FIRST + 2 + len(schema.releases())}_autotag_{schema.UNRELEASED}.sql"


def differences() -> list[str]:
    """What is not as it has to be, in sentences."""
    found = [f"{file} was released and has changed: restore it." for file in schema.changed_files()]
    wanted = expected()
    found += [
        f"{path.relative_to(schema.ROOT)} is not what the source says: run scripts/release."
        for path, text in wanted.items()
        if not path.exists() or path.read_text() != text
    ]
    known = {path.name for path in wanted} | {release.file for release in schema.releases()}
    found += [
        f"{p.name} is not made by scripts/release." for p in schema.MIGRATIONS.glob("*.sql") if p.name not in known
    ]
    return found


def write() -> None:
    """Makes the files."""
    wanted = expected()
    for path in schema.MIGRATIONS.glob(f"*_autotag_{schema.UNRELEASED}.sql"):
        if path not in wanted:
            path.unlink()
    for path, text in wanted.items():
        path.write_text(text)


def release(version: str) -> Path:
    """Turns what is not released yet into a release.

    Raises:
        ReleaseError: the version is no later one, there is nothing to release, or a released file has changed.
    """
    if not VERSION.fullmatch(version):
        raise schema.ReleaseError(f"{version} is no version (X.Y.Z).")
    earlier = [_order(each.version) for each in schema.releases()]
    if earlier and _order(version) <= max(earlier):
        raise schema.ReleaseError(f"{version} is not later than what is released already.")
    if changed := schema.changed_files():
        raise schema.ReleaseError(f"Released files have changed: {', '.join(changed)}. Restore them.")
    _set_version(version)
    text = schema.next_migration(version)
    if not text:
        raise schema.ReleaseError("Nothing has changed since the last release.")
    path = unreleased()
    final = path.with_name(path.name.replace(schema.UNRELEASED, version.replace(".", "_")))
    path.unlink(missing_ok=True)
    final.write_text(text)
    schema.RELEASES.mkdir(exist_ok=True)
    record = json.dumps(asdict(schema.record(version, final.name)), indent=1, sort_keys=True)
    (schema.RELEASES / f"{version}.json").write_text(record + "\n")
    if schema.CHANGES.exists():
        schema.CHANGES.write_text(schema.NO_CHANGES)
    schema.releases.cache_clear()
    write()
    return final


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _set_version(version: str) -> None:
    """Puts the version where the schema and the package say it."""
    for path, pattern in (
        (schema.SCHEMAS / "version.sql", r"(select ')[^']+('::text)"),
        (schema.ROOT / "worker" / "autotag" / "__init__.py", r'(__version__ = ")[^"]+(")'),
    ):
        path.write_text(re.sub(pattern, rf"\g<1>{version}\g<2>", path.read_text(), count=1))


def main(arguments: list[str]) -> int:
    try:
        if arguments == ["--check"]:
            found = differences()
            print("\n".join(found) if found else "The migrations are what the source says.")
            return bool(found)
        if not arguments:
            write()
        elif len(arguments) == 1 and not arguments[0].startswith("-"):
            path = release(arguments[0])
            print(f"Released: {path.relative_to(schema.ROOT)}. Commit it, and tag the commit v{arguments[0]}.")
        else:
            print("usage: scripts/release [--check | X.Y.Z]", file=sys.stderr)
            return 2
    except schema.ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
