"""Changes of webhooks, as API and dashboard make them.

Each is decided on a version and written only if the webhook still has it. Whoever knows which version they have seen
`expect`s it (else 412); for others a change that came in between is read and the decision made again, so nobody
overwrites what they have not seen. Another account's webhook is 404. All of them raise Problem.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from msgspec import UNSET, UnsetType

from dispatcher.model import EndpointStatus
from dispatcher.store.endpoints import EndpointChange, EndpointRecord, EndpointStore
from dispatcher.web.problems import Problem, not_found

CHANGE_TRIES: Final = 12  # a version is lost only to somebody who won it: some dozens at once all get their turn
WAY_S: Final = (0.005, 0.2)  # how long to stand back, at most: the first time, and ever

Expect = Callable[[EndpointRecord], None]
"""Raises Problem if the webhook is not in the version that its caller has seen."""


def anything(_: EndpointRecord) -> None:
    """Whatever version it is in."""


class Changes:
    """The changes."""

    def __init__(self, endpoints: EndpointStore) -> None:
        self._endpoints = endpoints

    async def current(self, account_id: int, webhook_id: str, expect: Expect = anything) -> EndpointRecord:
        """The webhook as it is."""
        record = await self._endpoints.get(account_id, webhook_id)
        if record is None:
            raise not_found("webhook")
        expect(record)
        return record

    async def update(
        self,
        account_id: int,
        webhook_id: str,
        change: Callable[[EndpointChange], EndpointChange],
        secret: str | UnsetType | None = UNSET,
        expect: Expect = anything,
    ) -> EndpointRecord:
        """Set what `change` makes of the settings, and a secret that takes the place of the old one at once."""
        for lost in range(CHANGE_TRIES):
            await _make_way(lost)
            current = await self.current(account_id, webhook_id, expect)
            new = change(settings(current))
            if new == settings(current) and secret is UNSET:
                return current
            record = await self._endpoints.update(account_id, current.id, new, secret=secret, version=current.version)
            if record is not None:
                return record
        raise _contended()

    async def delete(self, account_id: int, webhook_id: str, expect: Expect = anything) -> None:
        """Remove a webhook and what waits for it."""
        for lost in range(CHANGE_TRIES):
            await _make_way(lost)
            current = await self.current(account_id, webhook_id, expect)
            if await self._endpoints.delete(account_id, current.id, version=current.version):
                return
        raise _contended()

    async def pause(self, account_id: int, webhook_id: str, expect: Expect = anything) -> EndpointRecord:
        """Hold its events. Pausing twice is no mistake; pausing what is disabled is."""
        for lost in range(CHANGE_TRIES):
            await _make_way(lost)
            current = await self.current(account_id, webhook_id, expect)
            if current.status is EndpointStatus.DISABLED:
                raise Problem(409, "webhook_disabled", "A disabled webhook receives nothing: resume it first.")
            if current.status is EndpointStatus.PAUSED:
                return current
            record = await self._endpoints.pause(account_id, current.id, version=current.version)
            if record is not None:
                return record
        raise _contended()

    async def resume(self, account_id: int, webhook_id: str, expect: Expect = anything) -> EndpointRecord:
        """Active again, paused or disabled as it was."""
        for lost in range(CHANGE_TRIES):
            await _make_way(lost)
            current = await self.current(account_id, webhook_id, expect)
            if current.status is EndpointStatus.ACTIVE:
                return current
            record = await self._endpoints.resume(account_id, current.id, version=current.version)
            if record is not None:
                return record
        raise _contended()

    async def rotate(
        self, account_id: int, webhook_id: str, secret: str, grace: timedelta, expect: Expect = anything
    ) -> EndpointRecord:
        """Sign with `secret`, and with the one it replaces until the grace is over."""
        for lost in range(CHANGE_TRIES):
            await _make_way(lost)
            current = await self.current(account_id, webhook_id, expect)
            record = await self._endpoints.rotate(account_id, current.id, secret, grace, version=current.version)
            if record is not None:
                return record
        raise _contended()


def settings(record: EndpointRecord) -> EndpointChange:
    """A webhook's settings alone."""
    return EndpointChange(**{name: getattr(record, name) for name in EndpointChange.__struct_fields__})


async def _make_way(lost: int) -> None:
    """Stand back for a random while before the next try, longer each time, so that not all meet again."""
    if lost:
        first_s, most_s = WAY_S
        await asyncio.sleep(random.random() * min(most_s, first_s * 2**lost))  # noqa: S311  spreads load, guards nothing


def _contended() -> Problem:
    return Problem(409, "conflict", "The webhook is being changed by others at this moment. Try again.")
