"""What asyncpg would be, connected to the model: connections that behave, break and lie in wait like real ones.

A statement travels to the server, takes effect, and its answer travels back; `Weather` says how long each of these
takes and what goes wrong meanwhile. What a broken connection leaves behind is what TCP and PostgreSQL leave behind: a
statement that never arrived, one that is still being executed by a server process that does not know yet, one that has
committed and whose answer nobody heard.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import asyncpg
from model_postgres import Backend, ModelPostgres, Transaction
from model_statements import Statement, statement_of
from virtual_loop import PROCESS

VERSION = SimpleNamespace(major=18, minor=0)


class Weather:
    """How the way to the database is. This one is fair: everything at once, nothing lost."""

    def can_connect(self) -> Exception | None:
        """None, or why the server lets nobody in just now."""
        return None

    def connect_s(self) -> float:
        return 0.0

    def there_s(self, connection: ModelConnection, statement: Statement) -> float:
        """From the client to the server."""
        return 0.0

    def work_s(self, statement: Statement) -> float:
        """From the first write to the commit."""
        return 0.0

    def back_s(self, statement: Statement | None = None) -> float:
        """From the server to the client; None: something that answers no statement."""
        return 0.0

    def linger_s(self) -> float:
        """How long a server process lives on whose client is gone."""
        return 0.0

    def sent(self, connection: ModelConnection, statement: Statement) -> None:
        """A statement leaves: time for an ambush."""

    def executed(self, connection: ModelConnection, statement: Statement) -> None:
        """It has taken effect, its answer has not left yet."""


class Operation:
    """One statement under way."""

    __slots__ = ("answer", "arguments", "connection", "given_up", "over", "statement", "timer", "transaction")

    def __init__(self, connection: ModelConnection, statement: Statement, arguments: tuple[Any, ...]) -> None:
        loop = connection.loop
        self.connection = connection
        self.statement = statement
        self.arguments = arguments
        self.answer: asyncio.Future[Any] = loop.create_future()
        self.over: asyncio.Future[None] | None = None  # whoever comes after a cancelled one waits for it
        self.given_up = False
        self.transaction: Transaction | None = None
        self.timer: asyncio.TimerHandle | None = None

    # On the server.

    def arrive(self) -> None:
        backend = self.connection.backend
        if not (backend.alive and self.connection.reaches):
            return
        if self.given_up:  # the cancel request overtook it
            self.finish(asyncpg.QueryCanceledError("canceling statement due to user request"))
            return
        server, statement = backend.server, self.statement
        if not statement.writes:
            try:
                result: Any = statement.act(server, backend, *self.arguments)
            except asyncpg.PostgresError as error:
                result = error
            self.finish(result)
            return
        if statement.prepare is not None:
            self.arguments = (statement.prepare(server), *self.arguments)
        transaction = self.transaction = backend.transaction = server.begin(backend)
        transaction.number()
        if statement.locks:
            server.lock(transaction, statement.locks[0], self.locked)
        else:
            self.locked()

    def locked(self) -> None:
        self.connection.later(self.connection.weather.work_s(self.statement), self.commit)

    def commit(self) -> None:
        backend, transaction = self.connection.backend, self.transaction
        assert transaction is not None
        if transaction.done:  # its server process has gone meanwhile
            return
        backend.transaction = None
        try:
            result: Any = self.statement.act(backend.server, transaction, *self.arguments)
            transaction.commit()
        except asyncpg.PostgresError as error:
            transaction.abort()
            result = error
        self.connection.weather.executed(self.connection, self.statement)
        self.finish(result)

    def finish(self, result: Any) -> None:
        self.connection.backend.spoke_at = self.connection.backend.server.clock()
        if self.connection.reaches and self.connection.backend.alive:
            self.connection.later(self.connection.weather.back_s(self.statement), self.hear, result)

    # At the client.

    def hear(self, result: Any) -> None:
        if self.connection.reaches:
            self.connection.operation = None
            self.settle(result)

    def settle(self, result: Any) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if not self.answer.done():
            if isinstance(result, BaseException):
                self.answer.set_exception(result)
            else:
                self.answer.set_result(result)
        if self.over is not None and not self.over.done():
            self.over.set_result(None)

    def time_out(self) -> None:
        self.given_up = True
        if not self.answer.done():
            self.answer.set_exception(TimeoutError())


class ModelConnection:
    """An asyncpg.Connection, as far as the dispatcher uses one."""

    def __init__(self, server: ModelPostgres, weather: Weather, name: str, command_timeout_s: float | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.weather = weather
        self.name = name
        self.context = contextvars.copy_context()  # whose it is
        self.backend = Backend(server, name, self._notify)
        self.backend.owner = PROCESS.get()
        server.backends[self.backend] = None
        self.backend.on_end = self._ended
        self.operation: Operation | None = None
        self.reaches = True  # the network between the two is whole
        self._closed = False
        self._timeout_s = command_timeout_s
        self._listeners: dict[str, list[Callable[..., None]]] = {}
        self._termination: list[Callable[[Any], None]] = []

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def later(self, delay_s: float, act: Callable[..., None], *arguments: Any) -> None:
        """Have something happen outside of the client's process."""
        if delay_s:
            self.loop.call_later(delay_s, act, *arguments, context=_OUTSIDE)
        else:
            self.loop.call_soon(act, *arguments, context=_OUTSIDE)

    # ── statements ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _run(self, sql: str, arguments: tuple[Any, ...]) -> Any:
        if self._closed:
            raise asyncpg.InterfaceError("connection is closed")
        await self._after_cancelled()
        operation = self.operation = Operation(self, statement_of(sql), arguments)
        if self._timeout_s is not None:
            operation.timer = self.loop.call_later(self._timeout_s, operation.time_out, context=_OUTSIDE)
        self.weather.sent(self, operation.statement)
        if self.reaches:
            self.later(self.weather.there_s(self, operation.statement), operation.arrive)
        try:
            return await operation.answer
        except asyncio.CancelledError:
            operation.given_up = True
            raise

    async def _after_cancelled(self) -> None:
        before = self.operation
        if before is not None:
            if not before.given_up:
                raise asyncpg.InterfaceError("cannot perform operation: another operation is in progress")
            before.over = self.loop.create_future()
            await before.over
            if self._closed:
                raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")

    async def fetch(self, sql: str, *arguments: Any, timeout: float | None = None) -> list[Any]:
        return list(await self._run(sql, arguments))

    async def fetchrow(self, sql: str, *arguments: Any, timeout: float | None = None) -> Any:
        rows = await self._run(sql, arguments)
        return rows[0] if rows else None

    async def fetchval(self, sql: str, *arguments: Any, column: int = 0, timeout: float | None = None) -> Any:
        rows = await self._run(sql, arguments)
        return rows[0][column] if rows else None

    async def execute(self, sql: str, *arguments: Any, timeout: float | None = None) -> str:
        rows = await self._run(sql, arguments)
        return rows[0] if rows and isinstance(rows[0], str) else f"SELECT {len(rows)}"

    async def prepare(self, sql: str, *, name: str | None = None, timeout: float | None = None) -> ModelStatement:
        statement_of(sql)
        await self._run("SET prepare", ())
        return ModelStatement(self, sql)

    def transaction(self) -> ModelBlock:
        return ModelBlock(self)

    # ── notifications and the end ──────────────────────────────────────────────────────────────────────────────────

    async def set_type_codec(self, typename: str, **_: Any) -> None:
        """Rows of the model hold moments wherever a statement casts to this type."""
        assert typename == "timestamp"

    async def add_listener(self, channel: str, callback: Callable[..., None]) -> None:
        await self._run("SET listen", ())
        self._listeners.setdefault(channel, []).append(callback)
        self.backend.channels[channel] = None

    async def remove_listener(self, channel: str, callback: Callable[..., None]) -> None:
        self._listeners[channel].remove(callback)
        if not self._listeners[channel]:
            del self._listeners[channel]
            await self._run("SET unlisten", ())
            self.backend.channels.pop(channel, None)

    def _notify(self, channel: str, payload: str) -> None:
        if self.reaches:
            self.later(self.weather.back_s(), self._hear, channel, payload)

    def _hear(self, channel: str, payload: str) -> None:
        if self.reaches and not self._closed:
            for callback in self._listeners.get(channel, ()):
                self.loop.call_soon(callback, self, 0, channel, payload, context=self.context)

    def add_termination_listener(self, callback: Callable[[Any], None]) -> None:
        self._termination.append(callback)

    def get_server_version(self) -> Any:
        return VERSION

    def is_closed(self) -> bool:
        return self._closed

    async def close(self, *, timeout: float | None = None) -> None:
        if self._closed:
            return
        try:
            await self._after_cancelled()  # without a timeout: like the original
            async with asyncio.timeout(timeout):
                await self._run("SET goodbye", ())
        except BaseException:
            self.terminate()
            raise
        self.reaches = False
        self.backend.end()
        self._clean_up()

    def terminate(self) -> None:
        if not self._closed:
            self.break_off(notice=False)
            self._clean_up()

    def _clean_up(self) -> None:
        self._closed = True
        operation, self.operation = self.operation, None
        if operation is not None:
            operation.settle(asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"))
        callbacks, self._termination = self._termination, []
        for callback in callbacks:
            self.loop.call_soon(callback, self, context=self.context)

    def break_off(self, *, notice: bool = True, linger_s: float | None = None) -> None:
        """The network between the two is gone; `notice`: and the client knows. The server process finds out later."""
        if self.reaches:
            self.reaches = False
            self.later(self.weather.linger_s() if linger_s is None else linger_s, self.backend.end)
        if notice:
            self.lose()

    def _ended(self) -> None:
        """The server process exited: if the network is whole, the client hears of it."""
        if self.reaches:
            self.reaches = False
            self.later(self.weather.back_s(), self.lose)

    def lose(self) -> None:
        """The client finds out that the connection is gone."""
        if not self._closed:
            self._clean_up()


class ModelBlock:
    """BEGIN, and COMMIT or ROLLBACK."""

    def __init__(self, connection: ModelConnection) -> None:
        self._connection = connection

    async def __aenter__(self) -> None:
        await self._connection.execute("BEGIN")

    async def __aexit__(self, kind: Any, *_: Any) -> None:
        await self._connection.execute("COMMIT" if kind is None else "ROLLBACK")


class ModelStatement:
    """A prepared statement."""

    def __init__(self, connection: ModelConnection, sql: str) -> None:
        self._connection = connection
        self._sql = sql

    async def fetch(self, *arguments: Any, timeout: float | None = None) -> list[Any]:
        return await self._connection.fetch(self._sql, *arguments)

    async def fetchrow(self, *arguments: Any, timeout: float | None = None) -> Any:
        return await self._connection.fetchrow(self._sql, *arguments)

    async def fetchval(self, *arguments: Any, column: int = 0, timeout: float | None = None) -> Any:
        return await self._connection.fetchval(self._sql, *arguments, column=column)


_OUTSIDE = contextvars.Context()
"""No process's: what happens on the network and on the server happens whoever is dead."""


class Driver:
    """Stands in for `asyncpg.connect`."""

    def __init__(self, server: ModelPostgres, weather: Weather) -> None:
        self.server = server
        self.weather = weather
        self.connections: list[ModelConnection] = []

    async def connect(
        self, dsn: str = "", *, timeout: float = 10.0, command_timeout: float | None = None,
        server_settings: dict[str, str] | None = None, **_: Any,
    ) -> ModelConnection:  # fmt: skip
        settings = server_settings or {}
        async with asyncio.timeout(timeout):
            await asyncio.sleep(self.weather.connect_s())
        refusal = self.weather.can_connect()
        if refusal is not None:
            raise refusal
        name = settings.get("application_name", "?").removeprefix("dispatcher ")
        made = ModelConnection(self.server, self.weather, name, command_timeout)
        made.backend.asynchronous = settings.get("synchronous_commit") == "off"
        self.connections = [connection for connection in self.connections if connection.reaches]
        self.connections.append(made)
        return made
