"""The pages that people meet: the chat at `/`, the review queue at `/review`, their files under `/static/`.

Plain HTML, CSS and ES modules beside this file, without a build step. They know only the HTTP contract (DESIGN
section 10) and the session cookie, load nothing from elsewhere, and run under a policy that forbids inline script
and style; what people wrote reaches the page as text nodes only.
"""

import os
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent
_SERVED = frozenset({".css", ".js", ".svg"})
_FRESH = {"Cache-Control": "no-cache"}  # ask whether it changed: pages and modules of two versions must not meet


class _Files(StaticFiles):
    """The folder's style, scripts and icons, revalidated on each use; nothing else of the folder."""

    def lookup_path(self, path: str) -> tuple[str, os.stat_result | None]:
        return super().lookup_path(path) if Path(path).suffix in _SERVED else ("", None)

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(_FRESH)
        return response


async def _chat(request: Request) -> Response:
    return FileResponse(FOLDER / "index.html", headers=_FRESH)


async def _review(request: Request) -> Response:
    return FileResponse(FOLDER / "review.html", headers=_FRESH)


def routes() -> list[BaseRoute]:
    """`/`, `/review` and `/static/`, for the chat service's application. They need no key; what they call does."""
    return [
        Route("/", _chat, name="chat", include_in_schema=False),
        Route("/review", _review, name="review", include_in_schema=False),
        Mount("/static", _Files(directory=FOLDER), name="static"),
    ]
