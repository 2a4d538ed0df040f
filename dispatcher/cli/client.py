"""The REST API as a client sees it: one session, JSON both ways, refusals as Failures.

What goes wrong ends the command with an exit code that tells the reasons apart: the server cannot be reached (3), it
does not let us in (4), it refuses what we ask (1).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Final, Self
from urllib.parse import quote, urlsplit

import aiohttp

from dispatcher import __version__
from dispatcher.cli.output import FAILED, MISUSED, UNAUTHORISED, UNREACHABLE, Failure, hint

VERSION_PATH: Final = "/v1"
CONNECT_TIMEOUT_S: Final = 10.0
TIMEOUT_S: Final = 60.0  # longer than anything the API does; `test` waits for a subscriber's 30 s
PAGE_MAX: Final = 100  # what a list gives at once
PATIENCE: Final = 5  # times in a row that we come back when told to
WAIT_S_MAX: Final = 30.0
AWAY: Final = (502, 503, 504)  # something is in between, or the database is away


class Api:
    """One account's view of the API at `url`. Use it as an asynchronous context manager."""

    def __init__(self, url: str, key: str) -> None:
        self.url = base_url(url)
        self.key = key
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"<Api {self.url}>"

    @property
    def is_local(self) -> bool:
        """Whether the API is on this host."""
        host = urlsplit(self.url).hostname or ""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(host).is_loopback
        return host == "localhost"

    @property
    def is_exposed(self) -> bool:
        """Whether whoever is in between can read the key."""
        return not self.is_local and not self.url.startswith("https:")

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            headers={
                "Authorization": f"Bearer {self.key}",
                "Accept": "application/json",
                "User-Agent": f"trackpost-cli/{__version__}",
            },
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            trust_env=not self.is_local,  # HTTPS_PROXY and the like; no proxy leads to this host
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def call(
        self,
        method: str,
        *path: str,
        query: Mapping[str, str | int] | None = None,
        body: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Ask, and return the document that comes back; None when there is none to come.

        `path` is the segments below /v1. `body` is a document, or the bytes of one. Who is told that they ask too
        often, and when to come back, does as told for a while. Raises Failure.
        """
        assert self._session is not None, "the API is a context manager"
        url = "/".join([self.url, *(quote(segment, safe="") for segment in path)])
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **(headers or {})} if content is not None else dict(headers or {})
        with self._mapped():
            patience = PATIENCE
            while True:
                # No redirect is followed: the key is for this server.
                async with self._session.request(
                    method, url, params=query or None, data=content, headers=given, allow_redirects=False
                ) as response:
                    raw = await response.read()
                wait_s = _wait_s(response)
                if wait_s is None or not patience:
                    return self._understood(response, raw)
                patience -= 1
                hint(f"Asked too often: going on in {wait_s:.0f} s.")
                await asyncio.sleep(wait_s)

    async def stream(
        self, *path: str, query: Mapping[str, str], headers: Mapping[str, str], silence_s: float
    ) -> AsyncIterator[bytes | None]:
        """What an answer without an end brings: None once it has begun, then block by block.

        Raises Failure; also when nothing comes for `silence_s`.
        """
        assert self._session is not None, "the API is a context manager"
        url = "/".join([self.url, *(quote(segment, safe="") for segment in path)])
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S, sock_read=silence_s)
        given = {"Accept": "text/event-stream", **headers}
        with self._mapped():
            async with self._session.get(
                url, params=query, headers=given, timeout=timeout, allow_redirects=False
            ) as response:
                if response.status != 200:
                    self._understood(response, await response.read())
                yield None
                async for block in response.content.iter_any():
                    yield block

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        """Foreign exceptions as Failures."""
        try:
            yield
        except aiohttp.InvalidURL:
            raise Failure(f"{self.url!r} is no URL of an API", MISUSED) from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Failure(f"cannot reach {self.url}: {reason_of(error)}", UNREACHABLE) from None
        except ValueError as error:  # a key with a line break cannot stand in a header
            raise Failure(f"this cannot be sent: {error}", MISUSED) from None

    async def pages(self, *path: str, query: Mapping[str, str | int] | None = None) -> AsyncIterator[dict[str, Any]]:
        """Each page of a list from `query` on, up to the last."""
        asked = dict(query or {})
        while True:
            page = await self.call("GET", *path, query=asked)
            yield page
            if not page["has_more"]:
                return
            asked["after"] = page["next"]

    def _understood(self, response: aiohttp.ClientResponse, raw: bytes) -> Any:
        try:
            document = json.loads(raw) if raw else None
        except ValueError:
            document = None
        if 200 <= response.status < 300:
            if raw and document is None:
                raise Failure(f"{self.url} answered with something that is not JSON: is that the API?")
            return document
        if 300 <= response.status < 400:
            raise Failure(
                f"{self.url} redirects to {response.headers.get('Location', 'nowhere')}: use the API's own URL"
            )
        raise Failure(_told(response, document), _exit_code(response.status))


def base_url(text: str) -> str:
    """The API's URL, `/v1` included whether or not it was given. Raises Failure for what is no URL."""
    parts = urlsplit(text.rstrip("/"))
    if parts.scheme not in {"http", "https"} or not parts.netloc or parts.query or parts.fragment:
        raise Failure(f"{text!r} is no URL of an API, like https://api.example.com", MISUSED)
    return parts.geturl() if parts.path.endswith(VERSION_PATH) else parts.geturl() + VERSION_PATH


def _wait_s(response: aiohttp.ClientResponse) -> float | None:
    """How long to wait before asking again what was refused for being too much; None: there is no sense in that."""
    text = response.headers.get("Retry-After", "")
    if response.status != 429 or not text.isdecimal() or int(text) > WAIT_S_MAX:
        return None
    return max(1.0, float(text))


def _exit_code(status: int) -> int:
    if status in (401, 403):
        return UNAUTHORISED
    return UNREACHABLE if status in AWAY else FAILED


def _told(response: aiohttp.ClientResponse, document: Any) -> str:
    """What the API has against it, each wrong field on a line of its own."""
    if not isinstance(document, dict) or "detail" not in document:
        return f"{response.url.origin()} answered {response.status} {response.reason}: is that the API?"
    wrong = (f"  {error.get('field') or 'body'}: {error.get('message')}" for error in document.get("errors", ()))
    lines = [str(document["detail"]), *wrong]
    if retry_after := response.headers.get("Retry-After"):
        lines.append(f"  try again in {retry_after} s")
    return "\n".join(lines)


def reason_of(error: BaseException) -> str:
    """Why there was no answer, in a few words."""
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the connection broke off"
    if isinstance(error, asyncio.TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error is not None:
        number = error.os_error.errno or 0
        return (os.strerror(number) if number > 0 else str(error.os_error.strerror or error.os_error)).lower()
    return str(error) or type(error).__name__
