"""The boundary between requests and the program: whatever happens inside, what leaves is an orderly answer.

Each request has an id, the caller's own if it sent a sensible X-Request-Id, and the answer and the log name it. A
database that is away is 503 with Retry-After; a fault of ours is 500 and is logged, and its answer tells nothing of it.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Final

import asyncpg
from aiohttp import web

from dispatcher.logs import bound_contextvars, get_logger
from dispatcher.model import new_id
from dispatcher.store.database import TROUBLE
from dispatcher.web.problems import Problem, of_http, unavailable

RETRY_AFTER_S: Final = 2  # a failover or a restart takes a few seconds; a lost connection is replaced at once

# SQLSTATE classes: no connection, no resources, an operator's doing, the system. And a server that became a standby.
_AWAY_CLASSES: Final = frozenset({"08", "53", "57", "58"})
_READ_ONLY: Final = "25006"

_ID: Final = web.RequestKey("request_id", str)
_is_request_id: Final = re.compile(r"[A-Za-z0-9._-]{1,64}").fullmatch

log = get_logger("dispatcher.web")


@web.middleware
async def boundary(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Outermost of all: answers for whatever is raised below."""
    given = request.headers.get("X-Request-Id", "")
    request[_ID] = given if _is_request_id(given) else new_id("req_", time.time(), secrets.token_bytes(10))
    start = time.perf_counter()
    with bound_contextvars(request_id=request[_ID]):
        response = await _answer(request, handler)
        status = response.status
        level = logging.DEBUG if status < 400 else logging.WARNING if status == 500 else logging.INFO
        log.log(
            level,
            "request",
            method=request.method,
            path=request.path,
            status=status,
            duration_ms=round((time.perf_counter() - start) * 1e3, 2),
        )
    return response


async def _answer(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except Exception as error:  # noqa: BLE001  it is logged, or told
        return problem_of(request, error).response(request[_ID])


def problem_of(request: web.Request, error: Exception) -> Problem:
    """What to tell of an exception, which is logged if it is a fault of ours. Raises it if it is no error at all."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, web.HTTPException):
        if error.status < 400:
            raise error
        return of_http(error)
    if isinstance(error, TROUBLE) and _is_away(error):
        log.warning("request.unavailable", error=str(error) or type(error).__name__)
        return unavailable(RETRY_AFTER_S)
    log.error("request.failed", method=request.method, path=request.path, exc_info=error)
    return Problem(500, "internal_error", f"This is our fault. It was logged under {request[_ID]}.")


def _is_away(error: BaseException) -> bool:
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        return state[:2] in _AWAY_CLASSES or state == _READ_ONLY
    return not isinstance(error, ValueError)  # an argument that asyncpg cannot encode is an InterfaceError as well


async def finish_head(request: web.Request, response: web.StreamResponse) -> None:
    """Add to every answer, streams included, what all of them carry."""
    headers = response.headers
    headers["X-Request-Id"] = request.get(_ID, "")
    headers["X-Content-Type-Options"] = "nosniff"
    headers.setdefault("Referrer-Policy", "no-referrer")
    headers.setdefault("Cache-Control", "no-store")
    headers.popall("Server", None)
