"""What `dispatcher status` shows: the running daemons of a database, from what they write beside their heartbeat.

Every daemon leaves a Snapshot in the database each second. Rates are the difference of two of them, so that they say
what is going on now and not what has been going on since the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn

import msgspec

from dispatcher.cli.output import FAILED, Failure, cell, console, print_json
from dispatcher.snapshot import Snapshot
from dispatcher.store.database import place, statements

if TYPE_CHECKING:
    from rich.console import Group

    from dispatcher.config import Config

LOOK_S: Final = 0.25
_COLUMNS: Final = ("id", "host", "pid", "role", "version", "started_at", "heartbeat_at")
FRESH_S: Final = 1.6  # a heartbeat is due each second: without another one by then, there are no rates to tell


@dataclasses.dataclass(frozen=True, slots=True)
class Instance:
    """A daemon as it last described itself."""

    id: str
    host: str
    pid: int
    role: str
    version: str
    started_at: datetime
    heartbeat_at: datetime
    document: Mapping[str, Any]  # the snapshot as it was written
    snapshot: Snapshot


@dataclasses.dataclass(frozen=True, slots=True)
class Rates:
    """Per second, between two snapshots of one daemon."""

    events: float
    attempts: float
    delivered: float
    failed: float  # attempts that were no success


def no_daemon(where: str, as_json: bool) -> NoReturn:
    """End with exit code 1."""
    if as_json:
        print_json({"instances": []})
    raise Failure(f"no daemon is running on {where}; start one: dispatcher run", FAILED)


async def look(connection: Any, config: Config, *, watch: bool, as_json: bool) -> None:
    """Show the daemons once, or with `watch` until interrupted. Raises Failure when there is none."""
    before = await _instances(connection)
    if not before:
        no_daemon(place(config.database.dsn), as_json)
    if not watch:
        now = await _next(connection, before)
        _print(now, before, as_json)
        return
    with contextlib.suppress(asyncio.CancelledError):
        await (_stream if as_json else _watch)(connection, before)


async def _instances(connection: Any) -> dict[str, Instance]:
    rows = await connection.fetch(statements("shard")["instances"])
    return {row["id"]: _instance(row) for row in rows}


def _instance(row: Any) -> Instance:
    document = json.loads(row["snapshot"])
    # Of another version of this program while one replaces the other: what it does not know stays at its default.
    snapshot = msgspec.convert(document, Snapshot)
    return Instance(document=document, snapshot=snapshot, **{name: row[name] for name in _COLUMNS})


async def shard_rows(connection: Any) -> list[dict[str, object]]:
    """Each shard: its number, how many webhooks it has, the daemon that runs it, and until when its events are read."""
    running = {shard: id_ for id_, i in (await _instances(connection)).items() for shard in i.snapshot.shards}
    return [
        {"shard": row["id"], "webhooks": row["webhooks"], "run_by": running.get(row["id"]), "read_to": row["prev_at"]}
        for row in await connection.fetch(statements("shard")["shards"])
    ]


async def _next(connection: Any, before: Mapping[str, Instance]) -> dict[str, Instance]:
    """The daemons once one of them has told something new, or should have."""
    until = asyncio.get_running_loop().time() + FRESH_S
    while True:
        await asyncio.sleep(LOOK_S)
        now = await _instances(connection)
        known = {id_: instance.heartbeat_at for id_, instance in before.items()}
        if {id_: i.heartbeat_at for id_, i in now.items()} != known or asyncio.get_running_loop().time() > until:
            return now


def rates(now: Instance, before: Instance | None) -> Rates | None:
    """What happens per second; None when there are not two snapshots to tell from."""
    passed_s = now.snapshot.at_unix_s - before.snapshot.at_unix_s if before else 0.0
    if before is None or passed_s <= 0.0:
        return None
    new, old = now.snapshot, before.snapshot
    attempts = sum(new.attempts.values()) - sum(old.attempts.values())
    succeeded = new.attempts.get("2xx", 0) - old.attempts.get("2xx", 0)
    delivered = new.deliveries.get("delivered", 0) - old.deliveries.get("delivered", 0)
    return Rates(
        events=(new.events - old.events) / passed_s,
        attempts=attempts / passed_s,
        delivered=delivered / passed_s,
        failed=(attempts - succeeded) / passed_s,
    )


# ── for programs ───────────────────────────────────────────────────────────────────────────────────────────────────


async def _stream(connection: Any, before: dict[str, Instance]) -> None:
    while True:
        now = await _next(connection, before)
        print_json(document(now, before), on_one_line=True)
        sys.stdout.flush()
        before = now


def document(now: Mapping[str, Instance], before: Mapping[str, Instance]) -> dict[str, Any]:
    """Everything that is known, as JSON."""
    return {"instances": [_fields(instance, before.get(id_)) for id_, instance in now.items()]}


def _fields(instance: Instance, before: Instance | None) -> dict[str, Any]:
    found = rates(instance, before)
    return {
        **{name: getattr(instance, name) for name in _COLUMNS},
        "per_second": None if found is None else {k: round(v, 3) for k, v in dataclasses.asdict(found).items()},
        **{name: value for name, value in instance.document.items() if name != "role"},
    }


# ── for people ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _print(now: dict[str, Instance], before: dict[str, Instance], as_json: bool) -> None:
    if as_json:
        print_json(document(now, before))
    else:
        console().print(_view(now, before))


async def _watch(connection: Any, before: dict[str, Instance]) -> None:
    from rich.live import Live

    with Live(_view(before, {}), console=console(), screen=True, auto_refresh=False) as live:
        while True:
            now = await _next(connection, before)
            live.update(_view(now, before), refresh=True)
            before = now


def _view(now: Mapping[str, Instance], before: Mapping[str, Instance]) -> Group:
    from rich.console import Group
    from rich.text import Text

    if not now:
        return Group(Text("no daemon is running on this database any more", style="bold red"))
    return Group(*(part for id_, instance in now.items() for part in _parts(instance, before.get(id_))))


def _parts(instance: Instance, before: Instance | None) -> list[Any]:
    from rich.text import Text

    s = instance.snapshot
    style = "bold green" if s.role == "active" and s.database else "bold yellow"
    title = Text.assemble(
        (f"● {s.role if s.database else 'database away'}", style),
        f"  {cell(instance.host)} process {instance.pid}, version {cell(instance.version)}{_shards(s)}",
        (f", since {cell(instance.started_at)}", "bright_black"),
    )
    parts: list[Any] = [title]
    if s.role == "active":
        parts += [_figures(s, rates(instance, before)), *_worst(s)]
    return [*parts, Text("")]


def _shards(s: Snapshot) -> str:
    """Which shards it runs; nothing where there is only one, or none."""
    if s.shards in ([], [0]):
        return ""
    return f", shard{'s' if len(s.shards) > 1 else ''} {', '.join(map(str, s.shards))}"


def _figures(s: Snapshot, now: Rates | None) -> Any:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for column in range(6):
        table.add_column(style=None if column % 2 else "bright_black", justify="right" if column % 2 else "left")
    latency = s.delivery_latency.quantile(0.5) if s.delivery_latency else None
    late = s.delivery_latency.quantile(0.99) if s.delivery_latency else None
    figures = [
        ("events", _rate(now, "events")), ("in flight", f"{s.in_flight:,}"), ("lag", _duration(s.outbox_lag_s)),
        ("delivered", _rate(now, "delivered")), ("queued", f"{s.queued:,}"), ("backlog", f"{s.outbox_backlog:,}"),
        ("failed attempts", _rate(now, "failed")), ("retries waiting", f"{s.retries_waiting:,}"),
        ("oldest pending", _duration(s.oldest_pending_s)),
        ("delivered so far", f"{s.deliveries.get('delivered', 0):,}"),
        ("exhausted", f"{s.deliveries.get('exhausted', 0):,}"), ("latency p50 ≤", _duration(latency)),
        ("webhooks active", f"{s.endpoints.get('active', 0):,}"),
        ("paused, disabled", f"{s.endpoints.get('paused', 0):,}, {s.endpoints.get('disabled', 0):,}"),
        ("latency p99 ≤", _duration(late)),
    ]  # fmt: skip
    for start in range(0, len(figures), 3):
        table.add_row(*(text for figure in figures[start : start + 3] for text in figure))
    return table


def _rate(now: Rates | None, what: str) -> str:
    return "–" if now is None else f"{getattr(now, what):,.1f}/s"


def _worst(s: Snapshot) -> list[Any]:
    from rich import box
    from rich.table import Table

    if not s.worst:
        return []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title="in trouble", title_justify="left")
    for column in ("webhook", "health", "queued", "in flight", "window", "last error"):
        table.add_column(column, overflow="fold")
    for one in s.worst:
        queued = f"{one.queued:,}{' and more' if one.backlog else ''}"
        table.add_row(one.id, one.health, queued, str(one.in_flight), str(one.window), cell(one.error))
    return ["", table]


def _duration(seconds: float | None) -> str:
    """Seconds as people read them: three digits are plenty."""
    if seconds is None:
        return "–"
    for limit, unit, divisor in ((1.0, "ms", 1e-3), (120.0, "s", 1.0), (7200.0, "min", 60.0), (172_800.0, "h", 3600.0)):
        if seconds < limit:
            return f"{seconds / divisor:.3g} {unit}"
    return f"{seconds / 86_400:.3g} d"
