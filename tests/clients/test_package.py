"""The npm package as npm publishes it: its size, its files, and its calls in Node. scripts/lint checks its types for npm's users."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path

from conftest import ROOT
from npm import PACKAGE, built_package
from support import PATIENCE, Library, worker

HERE = Path(__file__).parent
LARGEST_CORE = 6_000  # bytes, gzipped


def test_it_is_small_and_depends_on_nothing() -> None:
    dist = built_package()
    said = subprocess.run(
        ["node", HERE / "size.mjs", dist / "index.js"], capture_output=True, text=True, check=True
    ).stdout
    size = json.loads(said)
    packed = subprocess.run(
        ["npm", "pack", "--dry-run", "--json", "--ignore-scripts"],
        cwd=PACKAGE,
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(packed.stdout)
    [tarball] = told if isinstance(told, list) else told.values()
    print(f"core: {size['minified']} bytes minified, {size['gzipped']} gzipped; tarball: {tarball['size']} bytes")
    assert size["gzipped"] < LARGEST_CORE
    assert size["imports"] == [], "the core imports nothing, not even supabase-js: it gets the client"
    files = {file["path"] for file in tarball["files"]}
    assert {
        "LICENSE",
        "README.md",
        "package.json",
        "dist/index.js",
        "dist/index.d.ts",
        "dist/react/index.js",
        "dist/react/index.d.ts",
    } <= files
    assert all(path.startswith("dist/") or path in ("LICENSE", "README.md", "package.json") for path in files)
    package = json.loads((PACKAGE / "package.json").read_text())
    assert "dependencies" not in package
    lowest = package["peerDependencies"]["@supabase/supabase-js"].removeprefix("^")
    assert package["scripts"]["lowest"].endswith(f" @supabase/supabase-js@{lowest}"), "CI tries it"


def test_the_gallery_has_the_core_as_it_is(tmp_path: Path) -> None:
    built_package()
    subprocess.run(["node", PACKAGE / "bundle.mjs", tmp_path / "autotag.js"], check=True)
    current = (ROOT / "lab" / "page" / "autotag.js").read_text()
    assert current == (tmp_path / "autotag.js").read_text(), (
        "run npm --prefix clients/js run bundle, and commit the file"
    )


def test_its_units() -> None:
    """Runs units.mjs: `stage`, the channel, and lists of rows, against a table in memory."""
    built_package()
    done = subprocess.run(["node", "--test", HERE / "units.mjs"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]


async def test_its_calls_and_messages_in_node(library: Library) -> None:
    assets = await library.upload(4)
    built_package()
    stack = library.stack
    environment = {
        "PATH": os.environ["PATH"], "SUPABASE_URL": stack.supabase_url, "SUPABASE_ANON_KEY": stack.anon_key,
        "MEMBER_TOKEN": library.member.token, "WORKSPACE_ID": library.member.workspace, "ASSET_IDS": json.dumps(assets),
    }  # fmt: skip
    async with worker(stack), asyncio.timeout(PATIENCE):
        process = await asyncio.create_subprocess_exec(
            "node", "--no-warnings", str(HERE / "package.mjs"), env=environment, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
    seen = json.loads(out)
    assert seen["statuses"][:2] == ["connecting", "live"]
    assert seen["job"]["image_count"] == 4
    assert (seen["after"]["completed"], seen["after"]["progress"]) == (4, 100)
    assert seen["events"][-1][0] == "complete"
    told = {asset for ids in seen["changed"] for asset in ids or assets}
    assert told == set(assets), "each image's change was told"
    assert seen["strategy"]["type"] == "batch"
    assert seen["limit"] == {"allowed": True, "retry_after": 0, "reason": None}
    assert sum(row["images"] for row in seen["usage"]) == 4
    assert seen["refused"] == {"ours": True, "code": "no_images", "retryAfter": None,
                               "hint": seen["refused"]["hint"], "message": seen["refused"]["message"]}  # fmt: skip
    assert seen["refused"]["hint"]
    assert seen["unknown"]["code"] == "unknown_job"
    assert seen["network"]["code"] == "network"
