"""The local edge refuses unsupported features with 501 and the feature's name."""

from __future__ import annotations

import httpx
import pytest

from support import Library


@pytest.mark.parametrize(
    ("method", "path", "feature"),
    [
        ("GET", "/rest/v1/workspaces?select=id,assets(id)", "assets(id)"),
        ("GET", "/rest/v1/workspaces?name=fts.cat", "fts"),
        ("GET", "/rest/v1/workspaces?or=(name.eq.a,name.fts.b)", "fts"),
        ("PUT", "/rest/v1/workspaces?id=eq.1", "PUT"),
        ("POST", "/storage/v1/object/move", "/object/move"),
        ("POST", "/storage/v1/object/copy", "/object/copy"),
        ("POST", "/storage/v1/upload/resumable/sign", "/upload/resumable/sign"),
        ("GET", "/storage/v1/render/image/public/assets/a.jpg", "/render/image"),
        ("POST", "/auth/v1/otp", "/auth/v1/otp"),
        ("POST", "/functions/v1/hello", "/functions/v1/hello"),
        ("POST", "/graphql/v1", "/graphql/v1"),
        ("GET", "/pg/tables", "/pg/tables"),
    ],
)
async def test_what_is_not_supported_is_named(library: Library, method: str, path: str, feature: str) -> None:
    headers = {"apikey": library.stack.anon_key, "authorization": f"Bearer {library.member.token}"}
    async with httpx.AsyncClient(base_url=library.stack.supabase_url) as client:
        answer = await client.request(method, path, headers=headers, json={} if method != "GET" else None)
    assert answer.status_code == 501, answer.text
    assert feature in answer.json()["message"]
