"""The demo's page: a gallery in plain HTML, CSS and one module, with the unmodified supabase-js."""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from lab.stack import Member, Stack

HERE = Path(__file__).parent
#: Where npm puts it in a checkout; without it the page takes it from a CDN.
SUPABASE_JS = HERE.parents[1] / "node_modules/@supabase/supabase-js/dist/umd/supabase.js"
CDN = "https://cdn.jsdelivr.net/npm/@supabase/supabase-js@2/dist/umd/supabase.js"


def make_page(stack: Stack) -> Starlette:
    """The page and the two things it has to know."""

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
    """The page as a member sees it."""
    return f"{page_url}/#workspace={member.workspace}&token={member.token}"
