"""Style sheet and scripts: read once, served under a path that changes with what they hold.

So a browser keeps them for a year and never asks again. Scripts import each other by relative paths, which is why all
of them share one version: the hash of everything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import Final

from aiohttp import web
from aiohttp.helpers import ETag

TYPES: Final = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
FOREVER: Final = "public, max-age=31536000, immutable"
AGAIN: Final = "no-cache"  # asked for with another version: ours may be a different text


class Assets:
    """The files of `static/dashboard`."""

    def __init__(self) -> None:
        self._files: Final = _read()
        whole = hashlib.sha256(b"".join(name.encode() + text for name, text in sorted(self._files.items())))
        self.version: Final = whole.hexdigest()[:12]

    def routes(self) -> list[web.RouteDef]:
        """Paths of the whole listener."""
        return [web.get(r"/assets/{version:[0-9a-f]{12}}/{name:[a-z0-9-]+\.(?:css|js|svg)}", self.get)]

    def path(self, name: str) -> str:
        """Where a page finds a file."""
        assert name in self._files, f"there is no {name}"
        return f"/assets/{self.version}/{name}"

    async def get(self, request: web.Request) -> web.Response:
        """One file."""
        name = request.match_info["name"]
        if name not in self._files:
            raise web.HTTPNotFound
        is_current = request.match_info["version"] == self.version
        headers = {"Cache-Control": FOREVER if is_current else AGAIN, "ETag": f'"{self.version}"'}
        tags = request.if_none_match or ()
        if any(tag in (ETag(self.version), ETag(self.version, is_weak=True)) for tag in tags):
            return web.Response(status=304, headers=headers)
        return web.Response(
            body=self._files[name], content_type=TYPES[name.rpartition(".")[2]], charset="utf-8", headers=headers
        )


def _read() -> Mapping[str, bytes]:
    folder = resources.files("dispatcher.web").joinpath("static", "dashboard")
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.rpartition(".")[2] in TYPES}
