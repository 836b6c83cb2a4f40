"""The demo's page: a gallery in plain HTML and CSS with one JavaScript module and the unmodified supabase-js."""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from lab.stack import Member, Stack

HERE = Path(__file__).parent
#: npm's copy; if it does not exist, the page loads supabase-js from the CDN.
SUPABASE_JS = HERE.parents[1] / "node_modules/@supabase/supabase-js/dist/umd/supabase.js"
CDN = "https://cdn.jsdelivr.net/npm/@supabase/supabase-js@2/dist/umd/supabase.js"


def make_page(stack: Stack) -> Starlette:
    """The page, its configuration (the project's URL and anon key) and supabase-js."""

    async def config(_: Request) -> Response:
        return JSONResponse({"url": stack.supabase_url, "anonKey": stack.anon_key})

    async def library(_: Request) -> Response:
        if SUPABASE_JS.exists():
            return FileResponse(SUPABASE_JS, media_type="text/javascript")
        return RedirectResponse(CDN)

    return Starlette(
        routes=[
            Route("/config.json", config),
            Route("/supabase.js", library),
            Mount("/", StaticFiles(directory=HERE, html=True)),
        ]
    )


def address(page_url: str, member: Member) -> str:
    """The page's address for a member."""
    return f"{page_url}/#workspace={member.workspace}&token={member.token}"
