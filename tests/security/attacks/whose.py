"""Rows that name another workspace's file. The owner or the service role may have inserted them."""

from __future__ import annotations

from dataclasses import dataclass

from attacks.attempt import Attempt, http
from attacks.scene import Scene


@dataclass(frozen=True)
class Way:
    """A row of the neighbour's workspace. ``foreign``: it clearly names a file of another workspace."""

    name: str
    path: str | None = None
    bucket: str | None = None
    url: str | None = None
    foreign: bool = True


def ways(scene: Scene) -> list[Way]:
    theirs, own = scene.ids["path"], scene.neighbour.member.workspace
    folder, name = theirs.split("/")
    storage = f"{scene.stack.supabase_url}/storage/v1/object"
    found = [
        Way("itself", theirs), Way("in its own bucket", theirs, "assets"), Way("by dots", f"{own}/../{theirs}"), Way("by dots twice", f"{own}/../../assets/{theirs}"),
        Way("from its own folder", f"{folder}/../{theirs}"), Way("by a dot", f"./{theirs}"), Way("by a dot inside", f"{folder}/./{name}"),
        Way("by a leading slash", f"/{theirs}"), Way("by two leading slashes", f"//{theirs}"), Way("by an empty segment", f"{folder}//{name}"),
        Way("in capitals", theirs.upper()), Way("in capitals, the folder alone", f"{folder.upper()}/{name}"), Way("by backslashes", theirs.replace("/", "\\")),
        Way("in another bucket", theirs, "private"), Way("in a bucket with a slash", theirs, "assets/../private"), Way("in a bucket of dots", theirs, ".."),
        Way("in a bucket of nothing", theirs, ""), Way("with an encoded slash", theirs.replace("/", "%2f")), Way("in the own folder's bucket", f"{own}/x.jpg", f"assets/{folder}"),
        Way("at the top", name), Way("with a blank", f" {theirs}"), Way("with a query", f"{theirs}?download"),
        # What looks odd and stays in its own folder leads nowhere.
        Way("by encoded dots", f"{own}/%2e%2e/{theirs}", foreign=False), Way("by encoded dots and slashes", f"{own}/..%2f{theirs}", foreign=False),
        Way("by backslashes from its own folder", f"{own}/..\\{theirs}", foreign=False),
    ]  # fmt: skip
    for route in ("authenticated", "public", "sign"):
        url = f"{storage}/{route}/assets/{theirs}"
        found += [
            Way(f"by {scheme} of the project's own Storage, {route}", url=url.replace("http", scheme, 1), foreign=False)
            for scheme in ("http", "https")
        ]
    return found


def insert(scene: Scene, some: list[Way]) -> dict[str, str]:
    """Inserts these rows as the owner. Returns their ids by name."""
    return {
        way.name: scene.neighbour.sql(
            "insert into public.assets (workspace_id, storage_path, storage_bucket, image_url) values (%s, %s, %s, %s) returning id::text",
            scene.neighbour.member.workspace, way.path, way.bucket, way.url)[0]["id"]
        for way in some
    }  # fmt: skip


def attempts(scene: Scene, some: list[Way]) -> list[Attempt]:
    """Enqueues each of these rows as the neighbour, which is refused."""
    token = scene.token("neighbour")
    return [
        Attempt(f"neighbour enqueues another's file {name}",
                http(token, "POST", "/rest/v1/rpc/enqueue_tagging", body={"asset_ids": [asset]}), r"4\d\d PT4\d\d")
        for name, asset in insert(scene, some).items()
    ]  # fmt: skip
