"""The application's side: writers whose transactions commit, roll back, stay open for long and overlap.

Each event's id is the writer's own, so that it is known whatever becomes of the statement. A transaction whose end
nobody has heard of is in doubt until PostgreSQL is asked.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import asyncpg

from dispatcher.store.database import TROUBLE

WRITERS = 4
PAUSE_S = 0.03  # at most, between two transactions of a writer
OPEN_S = 0.6  # at most, of a long transaction
TYPES = ("email.sent", "email.opened", "billing.paid")
AGAIN_S = 0.05

INSERT = "INSERT INTO dispatcher.outbox (id, type, data) VALUES ($1, $2, $3)"
EMIT = "SELECT dispatcher.emit($2, $3, id => $1)"


class RolledBack(Exception):
    """Ends a transaction, or a savepoint, on purpose."""


def roll_back() -> NoReturn:
    raise RolledBack


class Application:
    """Writers on one database, and what they know of their events: type by id."""

    def __init__(self, dsn: str, dice: random.Random) -> None:
        self.committed: dict[str, str] = {}
        self.rolled_back: dict[str, str] = {}
        self.in_doubt: dict[str, str] = {}
        self.troubles: Counter[str] = Counter()  # what ended writers' sessions, by the exception's name
        self._dsn = dsn
        self._dice = dice
        self._numbers = itertools.count(1)
        self._ending = asyncio.Event()

    @asynccontextmanager
    async def writing(self, writers: int = WRITERS) -> AsyncIterator[None]:
        """Write all the while; afterwards nothing is in doubt."""
        self._ending.clear()
        async with asyncio.TaskGroup() as group:
            for _ in range(writers):
                group.create_task(self._write_on())
            try:
                yield
            finally:
                self._ending.set()
        await self._ask()

    async def burst(self, count: int) -> None:
        """Commit so many events at once."""
        connection = await asyncpg.connect(self._dsn)
        events = {f"evt_burst{next(self._numbers)}": TYPES[0] for _ in range(count)}
        async with connection.transaction():
            await connection.executemany(INSERT, [(event, kind, "{}") for event, kind in events.items()])
        self.committed |= events
        await connection.close()

    async def _write_on(self) -> None:
        while not self._ending.is_set():
            connection = None
            try:
                connection = await asyncpg.connect(self._dsn, timeout=10)
                while not self._ending.is_set():
                    await self._transact(connection)
                    await asyncio.sleep(self._dice.uniform(0, PAUSE_S))
            except TROUBLE as error:
                self.troubles[type(error).__name__] += 1
                await asyncio.sleep(AGAIN_S)  # PostgreSQL is away, full, or has ended this session
            finally:
                if connection is not None:
                    connection.terminate()

    async def _transact(self, connection: Any) -> None:
        kind = self._dice.choice(("single", "several", "rolled back", "savepoint", "long"))
        kept, dropped = self._events(1 if kind == "single" else self._dice.randint(1, 4)), self._events(2)
        self.in_doubt |= kept
        try:
            async with connection.transaction(isolation=self._dice.choice(("read_committed", "repeatable_read"))):
                await self._insert(connection, kept)
                if kind == "savepoint":
                    self.rolled_back |= dropped
                    await self._within_savepoint(connection, dropped)
                if kind == "long":
                    await asyncio.sleep(self._dice.uniform(0, OPEN_S))
                    more = self._events(1)
                    kept |= more
                    self.in_doubt |= more
                    await self._insert(connection, more)
                if kind == "rolled back":
                    roll_back()
        except RolledBack:
            self.rolled_back |= kept
        else:
            self.committed |= kept
        for event in kept:
            del self.in_doubt[event]

    async def _within_savepoint(self, connection: Any, events: dict[str, str]) -> None:
        try:
            async with connection.transaction():
                await self._insert(connection, events)
                roll_back()
        except RolledBack:
            pass

    async def _insert(self, connection: Any, events: dict[str, str]) -> None:
        statement = self._dice.choice((INSERT, EMIT))
        for event, kind in events.items():
            await connection.fetchval(statement, event, kind, "{}")

    def _events(self, count: int) -> dict[str, str]:
        return {f"evt_{next(self._numbers)}": self._dice.choice(TYPES) for _ in range(count)}

    async def _ask(self) -> None:
        """Settle what is in doubt by what PostgreSQL has."""
        connection = await asyncpg.connect(self._dsn)
        found = await connection.fetch("SELECT id FROM dispatcher.outbox WHERE id = ANY ($1)", list(self.in_doubt))
        await connection.close()
        there = {row["id"] for row in found}
        for event, kind in self.in_doubt.items():
            (self.committed if event in there else self.rolled_back)[event] = kind
        self.in_doubt.clear()
