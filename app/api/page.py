"""The page at `/`: the files of the folder `app/page`, which are open to all, for the page itself asks for a key."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response

FOLDER = Path(__file__).parents[1] / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAFE = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}
"""Headers of every page: nothing comes from elsewhere, nothing is inline, and no other page learns of this one."""

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
"""The media types of files by how their names end; others, such as licences, are plain text."""

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page(request: Request) -> Response:
    """The page. NOTE: its addresses are relative, so that it is right behind a proxy with a prefix too."""
    return await part(request, "index.html")


@router.get("/page/{path:path}")
async def part(request: Request, path: str) -> Response:
    """A file of the page; a browser asks each time whether it has changed."""
    if path not in _files():
        raise HTTPException(404)
    data, tag = _files()[path]
    headers = {**SAFE, "Cache-Control": "no-cache", "ETag": tag}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=TYPES.get(Path(path).suffix, "text/plain"), headers=headers)


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """Every file of the folder and its ETag, by its path in the folder."""
    found = {file.relative_to(FOLDER).as_posix(): file.read_bytes() for file in FOLDER.rglob("*") if file.is_file()}
    return {path: (data, f'"{hashlib.sha256(data).hexdigest()[:32]}"') for path, data in found.items()}
