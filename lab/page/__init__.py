"""The demo's page: a gallery in plain HTML, CSS and JavaScript, with unmodified supabase-js and tus-js-client."""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from lab.stack import Member, Stack

HERE = Path(__file__).parent
#: The files of the libraries in node_modules. If a file does not exist, the page loads it from the CDN.
PACKAGES, CDN = HERE.parents[1] / "node_modules", "https://cdn.jsdelivr.net/npm"
LIBRARIES = {
    "/supabase.js": ("@supabase/supabase-js", "2", "dist/umd/supabase.js"),
    "/tus.js": ("tus-js-client", "4", "dist/tus.min.js"),
}


def make_page(stack: Stack) -> Starlette:
    """The page, its configuration (the project's URL and anon key) and its libraries."""

    async def config(_: Request) -> Response:
        return JSONResponse({"url": stack.supabase_url, "anonKey": stack.anon_key})

    async def library(request: Request) -> Response:
        package, version, path = LIBRARIES[request.url.path]
        if (copy := PACKAGES / package / path).exists():
            return FileResponse(copy, media_type="text/javascript")
        return RedirectResponse(f"{CDN}/{package}@{version}/{path}")

    return Starlette(
        routes=[
            Route("/config.json", config),
            *(Route(path, library) for path in LIBRARIES),
            Mount("/", StaticFiles(directory=HERE, html=True)),
        ]
    )


def address(page_url: str, member: Member) -> str:
    """The page's address for a member."""
    return f"{page_url}/#workspace={member.workspace}&token={member.token}"
