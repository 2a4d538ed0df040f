"""Answers that several pages ask for because of the same change, looked for once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """Keeps each answer for `kept_s`; who asks meanwhile gets the same one, or waits for it with the first."""

    def __init__(self, kept_s: float) -> None:
        self._kept_s = kept_s
        self._known: dict[Hashable, tuple[float, asyncio.Future[T]]] = {}

    async def get(self, key: Hashable, look: Callable[[], Awaitable[T]]) -> T:
        """The answer under this key; `look` finds it. Raises what `look` raises."""
        now = asyncio.get_running_loop().time()
        self._known = {
            other: (at, answer)
            for other, (at, answer) in self._known.items()
            if now - at < self._kept_s and not _has_failed(answer)
        }
        if key not in self._known:
            self._known[key] = (now, asyncio.ensure_future(_awaited(look)))
        return await asyncio.shield(self._known[key][1])


async def _awaited(look: Callable[[], Awaitable[T]]) -> T:
    return await look()


def _has_failed(answer: asyncio.Future[T]) -> bool:
    return answer.done() and (answer.cancelled() or answer.exception() is not None)
