"""`GET /v1/listen`: the account's events as they are committed, as server-sent events.

    id: evt_0194d1a5…
    event: email.delivered
    data: {"id":"evt_0194d1a5…","type":"email.delivered","version":"1.0",…}

`data` is the body a webhook gets, to the byte. `Last-Event-ID` goes on behind that event, so a connection that broke
missed nothing. What is sent again to a webhook, by hand or by a replay, comes again as well, under no `id` of its own;
automatic retries do not. A retry by hand comes when it is made, even if its webhook can take nothing just then: that is
when people listen. Events that cannot be sent at all are left out.

One loop reads for everybody who listens, and none runs when nobody does. A newcomer first joins that loop, which from
then on collects for it, and then reads by itself up to a snapshot: what the loop brings and that snapshot showed
already is dropped. So the seam shows neither a gap nor a repetition.

Whoever does not keep up with reading is cut off rather than waited for, and comes back with `Last-Event-ID`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import deque
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from typing import Final

from aiohttp import web

from dispatcher.core.rendering import Payload
from dispatcher.core.routing import fits
from dispatcher.errors import Undeliverable
from dispatcher.logs import get_logger
from dispatcher.model import BodyStyle, DeliveryKey
from dispatcher.store.accounts import KeyOwner
from dispatcher.store.database import TROUBLE
from dispatcher.store.tail import Position, Row, Tail
from dispatcher.web.answers import check_query
from dispatcher.web.auth import bearer, caller
from dispatcher.web.openapi import EVENT_STREAM, Answer, Parameter, operation
from dispatcher.web.parts import Web
from dispatcher.web.problems import FieldError, Problem, invalid

POLL_S: Final = 0.1  # a person watches; 1 ms of PostgreSQL's time each
AGAIN_S: Final = 2.0  # 60 µs of PostgreSQL for each webhook of an account that listens
BUSY_S: Final = 0.01  # between two pages when one was full
TROUBLE_S: Final = 1.0  # the database is away
JOIN_S: Final = 5.0  # the database takes longer than this only when it is away
HEARTBEAT_S: Final = 15.0
WRITE_S: Final = 30.0  # until a client that reads nothing is gone
QUEUE_BYTES_MAX: Final = 4 << 20  # sixteen of the largest events, thousands of ordinary ones
LISTENERS_MAX: Final = 200  # × QUEUE_BYTES_MAX is what they may cost if all of them stop reading: 800 MiB
ACCOUNT_LISTENERS_MAX: Final = 20
FILTERS_MAX: Final = 100
AGAIN_SEEN_MAX: Final = 10_000
GENERATION_MAX: Final = (1 << 31) - 1
RETRY_AFTER_S: Final = 10

_HELLO: Final = b"retry: 1000\n: listening\n\n"
_HEARTBEAT: Final = b": heartbeat\n\n"
_CLOSE: Final = (ConnectionError, TimeoutError, *TROUBLE)

_is_name: Final = re.compile(r"[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,6000})?").fullmatch

log = get_logger("dispatcher.web.listen")


class Message:
    """One event on its way to listeners: rendered once for each style, when somebody wants it."""

    __slots__ = ("_bodies", "_name", "row")

    def __init__(self, row: Row, name: str | None) -> None:
        self.row = row
        self._name = name
        self._bodies: dict[BodyStyle, bytes | None] = {}

    def text(self, style: BodyStyle) -> bytes | None:
        """As the stream spells it; None for what cannot be sent."""
        if style not in self._bodies:
            self._bodies[style] = self._render(style)
        return self._bodies[style]

    def _render(self, style: BodyStyle) -> bytes | None:
        row = self.row
        if row.data is None or row.created_at is None:
            return None
        try:
            body = Payload(row.event_id, row.type, row.created_at, row.data).body(style)
        except Undeliverable:
            return None
        named = b"" if self._name is None else b"id: %b\n" % self._name.encode()
        return b"%bevent: %b\ndata: %b\n\n" % (named, row.type.encode(), body)


class Listener:
    """One connection: what it wants, and what waits to be written to it."""

    def __init__(
        self, account: str, filters: tuple[str, ...], style: BodyStyle, transport: asyncio.BaseTransport | None = None
    ) -> None:
        self.account = account
        self.generation = GENERATION_MAX  # the newest when it joined, once known: older retries by hand are not its
        self.is_over = False
        self._transport = transport
        self._filters = filters
        self._style = style
        self._waiting: deque[Message] = deque()
        self._bytes = 0
        self._stirred = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Listener {self.account} {','.join(self._filters)}, {len(self._waiting)} waiting>"

    def wants(self, row: Row) -> bool:
        """Whether it asked for this."""
        return row.account == self.account and any(fits(row.type, one) for one in self._filters)

    def offer(self, message: Message) -> None:
        """Take a message, or end for having too many."""
        if self.is_over or not self.wants(message.row):
            return
        self._bytes += _weight(message)
        if self._bytes > QUEUE_BYTES_MAX:
            self.cut("does not keep up")
            return
        self._waiting.append(message)
        self._stirred.set()

    def end(self) -> None:
        """No more of it."""
        self.is_over = True
        self._waiting.clear()
        self._stirred.set()

    def cut(self, reason: str) -> None:
        """End at once, whatever is still on its way."""
        log.info("listen.cut", account=self.account, reason=reason)
        self.end()
        if isinstance(self._transport, asyncio.WriteTransport):
            self._transport.abort()

    @property
    def is_gone(self) -> bool:
        """Whether nobody is there any more."""
        return self._transport is not None and self._transport.is_closing()

    def text(self, message: Message) -> bytes | None:
        """The message as this listener gets it."""
        return message.text(self._style)

    async def next(self, timeout_s: float) -> Message | None:
        """The next message; None when there was none in time, or it is over."""
        if not self._waiting and not self.is_over:
            self._stirred.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._stirred.wait()
        if not self._waiting:
            return None
        message = self._waiting.popleft()
        self._bytes -= _weight(message)
        return message


class Feed:
    """The loop that reads for all listeners: begun by the first, ended with the last."""

    def __init__(self, tail: Tail) -> None:
        self.tail = tail
        self.listeners: set[Listener] = set()
        self._task: asyncio.Task[None] | None = None
        self._reading: asyncio.Future[None] | None = None  # done once the loop knows where it begins
        self._page = asyncio.Lock()  # held while one is read
        self._seen_again: dict[DeliveryKey, None] = {}
        self._shown_waiting: set[DeliveryKey] = set()  # retries by hand that were shown and not sent yet

    @property
    def is_running(self) -> bool:
        """Whether anything is read at all."""
        return self._task is not None

    @contextlib.asynccontextmanager
    async def joined(self, listener: Listener) -> AsyncIterator[None]:
        """Offer the listener everything that is committed from now on. Raises what reading the database raises."""
        self.listeners.add(listener)
        try:
            if self._task is None:
                self._reading = asyncio.get_running_loop().create_future()
                self._task = asyncio.create_task(self._run(self._reading), name="listen feed")
            assert self._reading is not None, "set with the task"
            async with asyncio.timeout(JOIN_S):
                await asyncio.shield(self._reading)
                # A page that is being read was asked for without us. What is committed behind its snapshot is ours.
                async with self._page:
                    pass
                listener.generation = await self.tail.newest_generation()
            yield
        finally:
            self.listeners.discard(listener)
            if not self.listeners and self._task is not None:
                self._task.cancel()
                self._task = None

    def end(self) -> None:
        """End every listener."""
        for listener in self.listeners:
            listener.end()

    async def _run(self, reading: asyncio.Future[None]) -> None:
        try:
            await self.tail.prepare()
            position = await self.tail.now()
            sent, since = await self.tail.again(position.since, ())
            sent, since = await self.tail.again(since, self._accounts())
            self._seen_again = dict.fromkeys(key for key, _ in sent)
            self._shown_waiting = set()
        except Exception as error:  # noqa: BLE001  whoever waits for it raises it
            self._task = None
            reading.set_exception(error)
            reading.exception()  # retrieved: nobody may be left waiting
            return
        reading.set_result(None)
        await self._read(position, since)

    async def _read(self, position: Position, since: datetime) -> None:
        loop = asyncio.get_running_loop()
        again_at = loop.time() + AGAIN_S
        while True:
            pause_s = POLL_S
            try:
                async with self._page:
                    page = await self.tail.read(position, self._accounts())
                position = page.after
                for row in page.rows:
                    self._offer(Message(row, self.tail.name(row)))
                pause_s = POLL_S if page.is_last else BUSY_S
                if loop.time() >= again_at:
                    since = await self._look_again(since)
                    again_at = loop.time() + AGAIN_S
            except TROUBLE as error:
                log.warning("listen.waiting", error=str(error) or type(error).__name__)
                pause_s = TROUBLE_S
            except Exception:
                log.exception("listen.failed")
                self.end()
                pause_s = TROUBLE_S
            for listener in self.listeners:
                if listener.is_gone:
                    listener.end()
            await asyncio.sleep(pause_s)

    async def _look_again(self, since: datetime) -> datetime:
        await self._show_waiting()
        sent, since = await self.tail.again(since, self._accounts())
        for key, row in sent:
            if key not in self._seen_again and key not in self._shown_waiting:
                self._offer(Message(row, None))
            self._seen_again[key] = None
        while len(self._seen_again) > AGAIN_SEEN_MAX:
            del self._seen_again[next(iter(self._seen_again))]
        return since

    async def _show_waiting(self) -> None:
        """Offer retries by hand that were made since; what is sent meanwhile is not shown again for that."""
        oldest = min((listener.generation for listener in self.listeners), default=GENERATION_MAX)
        waiting = await self.tail.made_again(oldest, self._accounts())
        self._seen_again |= dict.fromkeys(self._shown_waiting.difference(key for key, _ in waiting))
        shown: set[DeliveryKey] = set()
        for key, row in waiting:
            takers = [listener for listener in self.listeners if listener.generation < key[2]]
            if key not in self._shown_waiting:
                message = Message(row, None)
                for listener in takers:
                    listener.offer(message)
            if key in self._shown_waiting or any(listener.wants(row) for listener in takers):
                shown.add(key)
        self._shown_waiting = shown

    def _offer(self, message: Message) -> None:
        for listener in self.listeners:
            listener.offer(message)

    def _accounts(self) -> set[str]:
        return {listener.account for listener in self.listeners}


_EVENTS: Final = Parameter(
    "events", "Only these types, separated by commas: `email.delivered,billing.*`. All of them when it is absent."
)
_STYLE: Final = Parameter(
    "body_style",
    "As whose serialiser prints the body; see the setting of the same name of a webhook.",
    {"type": "string", "enum": [style.value for style in BodyStyle], "default": BodyStyle.COMPACT.value},
)
_LAST_ID: Final = Parameter("Last-Event-ID", "The `id` of an event: go on behind it.", place="header")


class Listen:
    """The call."""

    def __init__(self, parts: Web, tail: Tail) -> None:
        self._web = parts
        self.feed = Feed(tail)

    def routes(self) -> list[web.RouteDef]:
        """Paths below /v1."""
        return [web.get("/listen", self.listen, allow_head=False)]

    async def close(self, _app: web.Application) -> None:
        """End every stream: clients come back to whoever serves then."""
        self.feed.end()

    @operation(
        "Events",
        parameters=[_EVENTS, _STYLE, _LAST_ID],
        answers={200: Answer(None, "Events as they come, until one of us leaves.", content_type=EVENT_STREAM)},
        problems=["too_many_listeners"],
    )
    async def listen(self, request: web.Request) -> web.StreamResponse:
        """Live events, as server-sent events.

        Each message has an `id`, the event's type as `event`, and as `data` the very body that a webhook gets. Send the
        last `id` as `Last-Event-ID` to go on behind it after a break. What a webhook is sent again, by hand or by a
        replay, comes again too, without an `id`. A comment every 15 seconds shows that the connection lives; a client
        that does not keep up is cut off.
        """
        owner = caller(request)
        listener = self._listener(request, owner)
        last_id = request.headers.get("Last-Event-ID", "")
        async with self.feed.joined(listener):
            start = await self._start(owner.account, last_id)
            response = web.StreamResponse(headers={"Content-Type": EVENT_STREAM, "X-Accel-Buffering": "no"})
            await response.prepare(request)
            try:
                await _write(response, _HELLO)
                await self._stream(request, response, listener, start, is_resumed=bool(last_id))
            except _CLOSE as error:
                listener.cut(str(error) or type(error).__name__)
        return response

    async def _start(self, account: str, last_id: str) -> Position:
        if not last_id:
            return await self.feed.tail.now()
        start = await self.feed.tail.find(account, last_id) if _is_name(last_id) else None
        if start is None:
            raise invalid([FieldError("Last-Event-ID", "is not the id of an event that is still kept")])
        return start

    def _listener(self, request: web.Request, owner: KeyOwner) -> Listener:
        check_query(request, "events", "body_style")
        filters = tuple(filter(None, request.query.get("events", "*").split(","))) or ("*",)
        errors = [
            FieldError("events", problem)
            for problem in map(self._web.catalogue.check_filter, filters[:FILTERS_MAX])
            if problem is not None
        ]
        style = request.query.get("body_style", BodyStyle.COMPACT.value)
        if style not in [known.value for known in BodyStyle]:
            errors.append(FieldError("body_style", 'expected "compact" or "python"'))
        if len(filters) > FILTERS_MAX:
            errors.append(FieldError("events", f"expected at most {FILTERS_MAX} types"))
        if errors:
            raise invalid(errors)
        mine = sum(listener.account == owner.account for listener in self.feed.listeners)
        if mine >= ACCOUNT_LISTENERS_MAX or len(self.feed.listeners) >= LISTENERS_MAX:
            detail = f"At most {ACCOUNT_LISTENERS_MAX} connections of an account listen at a time."
            raise Problem(429, "too_many_listeners", detail, headers={"Retry-After": str(RETRY_AFTER_S)})
        return Listener(owner.account, filters, BodyStyle(style), request.transport)

    async def _stream(
        self,
        request: web.Request,
        response: web.StreamResponse,
        listener: Listener,
        position: Position,
        *,
        is_resumed: bool,
    ) -> None:
        """Write what the listener missed, then what comes."""
        while is_resumed:
            page = await self.feed.tail.read(position, (listener.account,))
            position, is_resumed = page.after, not page.is_last
            for text in self._texts(page.rows, listener):
                await _write(response, text)
        loop = asyncio.get_running_loop()
        beat_at = loop.time() + HEARTBEAT_S
        while not listener.is_over:
            message = await listener.next(max(0.0, beat_at - loop.time()))
            if message is not None and not (message.row.behind and position.has(message.row.xid)):
                found = listener.text(message)
                if found is not None:
                    await _write(response, found)
            if loop.time() >= beat_at:
                if await self._is_revoked(request):
                    return
                await _write(response, _HEARTBEAT)
                beat_at = loop.time() + HEARTBEAT_S

    async def _is_revoked(self, request: web.Request) -> bool:
        try:
            return await self._web.accounts.find_key(bearer(request)) is None
        except TROUBLE:
            return False  # nobody knows; the next heartbeat asks again

    def _texts(self, rows: list[Row], listener: Listener) -> Iterator[bytes]:
        for row in rows:
            if listener.wants(row):
                text = listener.text(Message(row, self.feed.tail.name(row)))
                if text is not None:
                    yield text


async def _write(response: web.StreamResponse, text: bytes) -> None:
    async with asyncio.timeout(WRITE_S):
        await response.write(text)


def _weight(message: Message) -> int:
    return len(message.row.data or "") + 256
