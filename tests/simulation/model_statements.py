"""What the dispatcher's named statements do to the model of PostgreSQL: a register that `statements_engine` and
`statements_webhooks` fill, and the transactions around them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import import_module
from typing import Any, Final

from model_postgres import Backend, Event, ModelPostgres, Transaction

from dispatcher.store.database import statements

Act = Callable[..., list[Any]]


class Statement:
    """How one named statement of ours behaves."""

    __slots__ = ("act", "locks", "name", "prepare", "writes")

    def __init__(
        self, name: str, act: Act, *, writes: bool, locks: Sequence[str] = (), prepare: Callable[..., Any] | None = None
    ) -> None:
        self.name = name
        self.act = act
        self.writes = writes
        self.locks = locks
        self.prepare = prepare  # called as the statement begins: what it takes along to its commit


_BY_NAME: dict[tuple[str, str], Statement] = {}


def reads(file: str, *names: str) -> Callable[[Act], Act]:
    """Models statements of a file (without one: of this text) that read, or act at once."""

    def note(act: Act) -> Act:
        for name in names:
            _BY_NAME[file, name] = Statement(name, act, writes=False)
        return act

    return note


def writes(
    file: str, *names: str, locks: Sequence[str] = (), prepare: Callable[..., Any] | None = None
) -> Callable[[Act], Act]:
    """Models statements that are transactions of their own, which act at their commit, behind their row locks."""

    def note(act: Act) -> Act:
        for name in names:
            _BY_NAME[file, name] = Statement(name, act, writes=True, locks=locks, prepare=prepare)
        return act

    return note


def statement_of(sql: str) -> Statement:
    """The model of a statement, by its text."""
    known = _by_text()
    found = known.get(sql)
    if found is None and sql.startswith(("SET ", "RESET ", "LOCK TABLE ", "DROP TABLE ")):
        return _NOTHING
    if found is None and (leaf := re.search(r'dispatcher\."outbox_(\d{8})"', sql)):
        return _of_leaf(sql, datetime.strptime(leaf[1], "%Y%m%d").replace(tzinfo=UTC))
    assert found is not None, f"the model does not know this statement: {sql:.300}"
    return found


_TEXTS: dict[str, Statement] = {}


def _by_text() -> dict[str, Statement]:
    if not _TEXTS:
        for models in ("statements_engine", "statements_webhooks"):
            import_module(models)

        for (file, name), statement in _BY_NAME.items():
            _TEXTS[statements(file)[name] if file else name] = statement
    return _TEXTS


_NOTHING: Final = Statement("set", lambda server, backend, *_: ["SET"], writes=False)


def _of_leaf(sql: str, day: datetime) -> Statement:
    """TRUNCATE of one day of the outbox, or the question whether all of it is read."""

    def rows(server: ModelPostgres) -> list[Event]:
        return [event for _, _, event in server.events if event.written_at.date() == day.date()]

    def is_unread(server: ModelPostgres, backend: Backend) -> list[Any]:
        unread = [
            event for event in rows(server) for shard in server.shards.values()
            if event.written_at >= shard["floor"] and not server.visible(event.xid, shard["prev"])
        ]  # fmt: skip
        return [(bool(unread),)]

    def truncate(server: ModelPostgres, backend: Backend) -> list[Any]:
        transaction = block(backend)
        transaction.number()
        transaction.acts.append(lambda: server.drop(transaction, rows(server)))
        return ["TRUNCATE TABLE"]

    return Statement("leaf", truncate if sql.startswith("TRUNCATE") else is_unread, writes=False)


def block(backend: Backend) -> Transaction:
    """The transaction that is open there."""
    assert backend.transaction is not None
    return backend.transaction


# -- transactions of more than one statement


@reads("", "BEGIN")
def _begin(server: ModelPostgres, backend: Backend) -> list[Any]:
    backend.transaction = server.begin(backend)
    return ["BEGIN"]


@reads("", "COMMIT")
def _commit(server: ModelPostgres, backend: Backend) -> list[Any]:
    transaction, backend.transaction = block(backend), None
    transaction.commit()
    return ["COMMIT"]


@reads("", "ROLLBACK")
def _rollback(server: ModelPostgres, backend: Backend) -> list[Any]:
    transaction, backend.transaction = block(backend), None
    transaction.abort()
    return ["ROLLBACK"]
