"""The operator's page: every account, the daemons, the database, what is in force.

It opens with the operator key of the configuration; without one there is no such page. Its session is a cookie of its
own that no other page looks at, so it acts for no account, and an account's session opens nothing here. The cookie is
sealed by a key made of the operator key, needs no database, and is good for half a day: an operator looks when the
database is away, too, and whoever changes the key ends every session.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, timedelta
from typing import Final

from aiohttp import web

from dispatcher.snapshot import Snapshot, TroubledEndpoint
from dispatcher.store.database import TROUBLE
from dispatcher.store.operator import AccountState, Instance, KnownWebhook, Partition, Server, ShardState
from dispatcher.web.dashboard.desk import Desk
from dispatcher.web.dashboard.rendering import duration
from dispatcher.web.dashboard.visits import Handler, is_secure, read_form, utc_now
from dispatcher.web.parts import Operator

COOKIE: Final = "dispatcher_operator"
LIFE_S: Final = 12 * 3600
LOOK_S: Final = 5.0  # the database takes longer than this only when it is in trouble
ACCOUNTS: Final = 25
FRESH: Final = timedelta(seconds=5)  # heartbeats come each second
HORIZON: Final = timedelta(days=2)  # of partitions ahead; upkeep keeps a week
RATE_S: Final = 2.0  # the shortest stretch that rates are told of
LAG_S: Final = 30.0
OLD_TRANSACTION: Final = timedelta(minutes=10)


class OperatorSeal:
    """Sessions as sealed texts: when one ends, a random number, and the seal of both."""

    def __init__(self, key: str, clock: Callable[[], float] = time.time) -> None:
        self._digest = hashlib.sha256(key.encode()).digest()
        self._key = hmac.digest(key.encode(), b"operator session", "sha256")
        self._clock = clock

    def opens(self, key: str) -> bool:
        """Whether this is the key. In constant time, whatever its length."""
        return hmac.compare_digest(hashlib.sha256(key.encode()).digest(), self._digest)

    def begin(self) -> str:
        """A session that begins now."""
        text = f"{int(self._clock()) + LIFE_S}.{secrets.token_hex(16)}"
        return f"{text}.{self._seal(text)}"

    def holds(self, session: str) -> bool:
        """Whether this is a session of ours that has not ended."""
        text, _, seal = session.rpartition(".")
        if not hmac.compare_digest(self._seal(text).encode(), seal.encode()):
            return False
        return int(text.partition(".")[0]) > self._clock()

    def _seal(self, text: str) -> str:
        return hmac.digest(self._key, text.encode(), "sha256").hex()


@dataclasses.dataclass(frozen=True, slots=True)
class Rates:
    """Per second, between two looks at one daemon."""

    events: float
    delivered: float
    failed: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Days:
    """The partitions of one table."""

    table: str
    first: date | None
    last: date | None
    bytes: int
    rows: int
    astray: int  # rows that no day took
    partitions: Sequence[Partition]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """Everything that the database knows."""

    instances: Sequence[Instance]
    accounts: Sequence[AccountState]
    next_account: str | None
    worst: Sequence[tuple[TroubledEndpoint, KnownWebhook]]
    server: Server
    shards: Sequence[ShardState]
    days: Sequence[Days]


class OperatorPages:
    """The pages."""

    def __init__(self, desk: Desk, operator: Operator) -> None:
        self._desk = desk
        self._operator = operator
        self._seal = OperatorSeal(operator.key)
        self._seen: dict[str, tuple[Snapshot, Snapshot]] = {}  # by daemon: two looks, at least RATE_S apart

    def routes(self) -> list[web.RouteDef]:
        """Paths of the whole listener."""
        door = self._desk.door
        return [
            web.get("/operator", door.for_all(self._for_operators(self.show))),
            web.get("/operator/sign-in", door.for_all(self.ask)),
            web.post("/operator/sign-in", door.for_all(self.sign_in)),
            web.post("/operator/sign-out", door.for_all(self.sign_out)),
        ]

    def _for_operators(self, handler: Handler) -> Handler:
        async def serve(request: web.Request) -> web.StreamResponse:
            if not self._is_operator(request):
                raise web.HTTPSeeOther("/operator/sign-in")
            return await handler(request)

        return serve

    def _is_operator(self, request: web.Request) -> bool:
        return self._seal.holds(request.cookies.get(_cookie(request), ""))

    async def ask(self, request: web.Request) -> web.StreamResponse:
        """The form."""
        if self._is_operator(request):
            raise web.HTTPSeeOther("/operator")
        return self._form(request)

    async def sign_in(self, request: web.Request) -> web.StreamResponse:
        """Begin a session, if that is the key."""
        key = (await read_form(request)).get("key", "").strip()
        wait_s = math.ceil(self._desk.door.count_attempt(request))
        if wait_s:
            return self._form(request, 429, f"Too many attempts. Try again in {duration(wait_s)}.", wait_s)
        if not self._seal.opens(key):
            return self._form(request, 422, "This is not the operator key.")
        response = web.Response(status=303, headers={"Location": "/operator"})
        response.set_cookie(
            _cookie(request),
            self._seal.begin(),
            max_age=LIFE_S,
            path="/",
            httponly=True,
            samesite="Strict",
            secure=is_secure(request),
        )
        return response

    async def sign_out(self, request: web.Request) -> web.StreamResponse:
        """Take the session from the browser."""
        response = web.Response(status=303, headers={"Location": "/operator/sign-in"})
        response.del_cookie(_cookie(request), path="/")
        return response

    def _form(self, request: web.Request, status: int = 200, error: str = "", wait_s: int = 0) -> web.Response:
        headers = {"Retry-After": str(wait_s)} if wait_s else None
        return self._desk.templates.page(request, "operator-sign-in.html", status=status, headers=headers, error=error)

    async def show(self, request: web.Request) -> web.StreamResponse:
        """The page; without the database, what this daemon knows by itself."""
        after, trouble, found = request.query.get("after", ""), "", None
        try:
            async with asyncio.timeout(LOOK_S):
                found = await self._look(after if after.isprintable() else "")
        except TROUBLE as error:
            trouble = str(error) or "it did not answer in time"
        return self._desk.templates.page(
            request,
            "operator.html",
            found=found,
            trouble=trouble,
            shown=_active(found) or self._desk.parts.snapshot(),
            warnings=warnings(found, utc_now()) if found else [],
            rates=self._rates(found.instances) if found else {},
            settings=_spelt(self._operator.settings),
            after=after,
            fresh=FRESH,
        )

    async def _look(self, after: str) -> Installation:
        store = self._operator.store
        instances = await store.instances()
        accounts = await store.accounts(after, ACCOUNTS + 1)
        alive = [one for one in instances if one.now - one.heartbeat_at < FRESH]
        worst = {endpoint.id: endpoint for one in alive for endpoint in one.snapshot.worst}
        known = await store.webhooks(list(worst))
        return Installation(
            instances=instances,
            accounts=accounts[:ACCOUNTS],
            next_account=accounts[ACCOUNTS - 1].name if len(accounts) > ACCOUNTS else None,
            worst=[(endpoint, known[id_]) for id_, endpoint in worst.items() if id_ in known],
            server=await store.server(),
            shards=await store.shards(),
            days=_days(await store.partitions()),
        )

    def _rates(self, instances: Sequence[Instance]) -> dict[str, Rates]:
        """What each daemon does now, as far as it was looked at before."""
        found = {}
        for one in instances:
            before, last = self._seen.get(one.id, (one.snapshot, one.snapshot))
            if one.snapshot.at_unix_s - last.at_unix_s >= RATE_S:
                before, last = last, one.snapshot
            found[one.id] = (before, last)
        self._seen = found
        return {id_: _rate(*pair) for id_, pair in found.items() if pair[0] is not pair[1]}


def warnings(found: Installation, now: datetime) -> list[tuple[str, str]]:
    """What an operator should see to, the worst in front: what is wrong, and what to do."""
    alive = [one for one in found.instances if one.now - one.heartbeat_at < FRESH]
    active = [one for one in alive if one.role == "active"]
    told = []
    if not active:
        told.append(("No daemon delivers.", "Start one: dispatcher run. Events wait in the outbox meanwhile."))
    elif len(alive) == 1:
        told.append(("No other daemon stands by.", "A second one on the same database takes over if this one goes."))
    if any(one.snapshot.outbox_lag_s > LAG_S for one in active):
        told.append(("Events are read late.", "Look at the load of this machine and of the database."))
    if found.server.connections >= 0.9 * found.server.connections_max:
        told.append(("The database has hardly any connections left.", "Raise max_connections, or find who holds them."))
    oldest = found.server.oldest_transaction_at
    if oldest is not None and now - oldest > OLD_TRANSACTION:
        told.append(
            (
                f"A transaction has been open for {duration(now - oldest)}.",
                "It keeps the tables from being vacuumed: see pg_stat_activity.",
            )
        )
    for days in found.days:
        if days.last is None or days.last < (now + HORIZON).date():
            told.append((f"The partitions of {days.table} end soon.", "The active daemon makes them: see its log."))
        if days.astray:
            told.append(
                (f"Rows of {days.table} lie in its DEFAULT partition.", "They are kept, but dropped more slowly.")
            )
    return told


def _active(found: Installation | None) -> Snapshot | None:
    """What the daemon that delivers says of itself."""
    active = [one for one in found.instances if one.role == "active"] if found else []
    return active[0].snapshot if active else None


def _rate(before: Snapshot, after: Snapshot) -> Rates:
    seconds = after.at_unix_s - before.at_unix_s

    def of(old: int, new: int) -> float:
        return max(0, new - old) / seconds

    gone = [sum(one.deliveries.get(state, 0) for state in ("exhausted", "discarded")) for one in (before, after)]
    return Rates(
        of(before.events, after.events),
        of(before.deliveries.get("delivered", 0), after.deliveries.get("delivered", 0)),
        of(*gone),
    )


def _days(partitions: Sequence[Partition]) -> list[Days]:
    found = []
    for table in dict.fromkeys(one.parent for one in partitions):
        mine = [one for one in partitions if one.parent == table]
        days = [one.day for one in mine if one.day is not None]
        found.append(
            Days(
                table=table,
                first=min(days, default=None),
                last=max(days, default=None),
                bytes=sum(one.bytes for one in mine),
                rows=sum(one.rows for one in mine),
                astray=sum(one.rows for one in mine if one.day is None),
                partitions=mine,
            )
        )
    return found


def _spelt(settings: Mapping[str, Mapping[str, object]]) -> dict[str, dict[str, str]]:
    """Settings as people read them."""
    return {section: {name: _setting(value) for name, value in keys.items()} for section, keys in settings.items()}


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value) or "–"


def _cookie(request: web.Request) -> str:
    """With the prefix, a browser takes the cookie from nobody but this very host, and over https only."""
    return f"__Host-{COOKIE}" if is_secure(request) else COOKIE
