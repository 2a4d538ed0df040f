"""Who is calling, and whether not too often.

Every call names a key: `Authorization: Bearer tp_live_…`. A key is looked up on every call and nothing is remembered,
so one that is revoked is refused from the next call on. Each key has a bucket of tokens that fills at a steady rate; a
call takes one, and without one it is 429 with the seconds until there is.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Middleware

from dispatcher.store.accounts import AccountStore, KeyOwner
from dispatcher.web.problems import Problem

LOOK_UP_TIMEOUT_S: Final = 5.0
"""The first thing each call asks of the database: when this takes long, there is no connection to be had, so say so."""

BUCKETS_MAX: Final = 10_000  # ≈ 2 MiB

_CALLER: Final = web.RequestKey("caller", KeyOwner)


class RateLimit:
    """A bucket of tokens for each key, in memory: `per_second` more each second, `burst` at most."""

    def __init__(
        self, per_second: float = 100.0, burst: int = 200, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_second = per_second
        self._burst = float(burst)
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # tokens, and when there were as many

    def take(self, key_id: str) -> float:
        """Take a token: 0.0 if there was one, else the seconds until there is."""
        now = self._clock()
        tokens, at = self._buckets.get(key_id, (self._burst, now))
        tokens = min(self._burst, tokens + (now - at) * self._per_second)
        if key_id not in self._buckets and len(self._buckets) >= BUCKETS_MAX:
            self._forget_full(now)
        self._buckets[key_id] = (tokens - 1.0 if tokens >= 1.0 else tokens, now)
        return 0.0 if tokens >= 1.0 else (1.0 - tokens) / self._per_second

    def _forget_full(self, now: float) -> None:
        """A full bucket is like none at all. If all are in use, everybody gets a full one: generous, and bounded."""
        self._buckets = {
            key: (tokens, at)
            for key, (tokens, at) in self._buckets.items()
            if tokens + (now - at) * self._per_second < self._burst
        }
        if len(self._buckets) >= BUCKETS_MAX:
            self._buckets.clear()

    def __repr__(self) -> str:
        return f"<RateLimit {self._per_second:g}/s, burst {self._burst:g}, {len(self._buckets)} keys>"


def caller(request: web.Request) -> KeyOwner:
    """Whose request this is."""
    return request[_CALLER]


def bearer(request: web.Request) -> str:
    """The key that a request presents. Raises Problem if it presents none."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise _unauthorized("Send your API key as Authorization: Bearer tp_live_….", "Bearer")
    return key.strip()


def authentication(accounts: AccountStore, limit: RateLimit) -> Middleware:
    """Let through only calls with a key that is valid and not exhausted; handlers then find its owner by `caller`."""

    @web.middleware
    async def authenticate(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        async with asyncio.timeout(LOOK_UP_TIMEOUT_S):
            owner = await accounts.find_key(bearer(request))
        if owner is None:
            raise _unauthorized("This API key is unknown or revoked.", 'Bearer error="invalid_token"')
        wait_s = limit.take(owner.key_id)
        if wait_s > 0.0:
            retry_after = {"Retry-After": str(math.ceil(wait_s))}
            raise Problem(429, "rate_limited", "This API key makes too many requests.", headers=retry_after)
        request[_CALLER] = owner
        return await handler(request)

    return authenticate


def _unauthorized(detail: str, challenge: str) -> Problem:
    return Problem(401, "unauthorized", detail, headers={"WWW-Authenticate": challenge})
