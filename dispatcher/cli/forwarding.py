"""Forwarding live events to a local server, for `trackpost listen`.

Each event is asked of the API's stream and posted to the local server as the dispatcher would: the same bytes, the same
headers, both signatures, by a secret of this run. One line tells of each event that comes, one of each answer. When
the connection breaks, that is said, and it is made again from the last event on: nothing is missed, and what comes
twice is forwarded once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import secrets
import signal
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import click

from dispatcher.cli.output import (
    MISUSED,
    UNAUTHORISED,
    Failure,
    is_plain,
    print_json,
    printable,
)

if TYPE_CHECKING:
    import aiohttp

    from dispatcher.cli.client import Api
    from dispatcher.core.signing import Signer

TIMEOUT_S: Final = 30.0  # what a delivery has by default
SILENCE_S: Final = 45.0  # three heartbeats
BACKOFF_S: Final = (0.5, 30.0)
IN_FLIGHT_MAX: Final = 16  # what a webhook has by default
SEEN_MAX: Final = 10_000
LINE_BYTES_MAX: Final = 4 << 20  # of the stream; a body has at most 256 KiB
ANSWER_BYTES_MAX: Final = 65536


@dataclasses.dataclass(frozen=True, slots=True)
class Received:
    """One event as the stream brought it. `place` is where to go on behind it; empty for what is sent again."""

    place: str
    type: str
    event_id: str
    body: bytes


class Messages:
    """Server-sent events out of the bytes of a stream (HTML, section 9.2.6)."""

    def __init__(self) -> None:
        self._rest = b""
        self._fields: dict[str, list[str]] = {}

    def feed(self, block: bytes) -> Iterator[dict[str, str]]:
        """Each message that is complete with these bytes, by field; comments alone make none. Raises ValueError."""
        *lines, self._rest = (self._rest + block).replace(b"\r\n", b"\n").split(b"\n")
        if len(self._rest) > LINE_BYTES_MAX:
            raise ValueError("a line without an end")
        for line in lines:
            if line:
                name, _, value = line.decode("utf-8", "replace").partition(":")
                self._fields.setdefault(name, []).append(value.removeprefix(" "))
                continue
            message = {name: "\n".join(values) for name, values in self._fields.items() if name}
            self._fields = {}
            if "data" in message:
                yield message


async def run(session: Session, secret: str) -> None:
    """Listen until Ctrl-C. Raises Failure."""
    running = asyncio.create_task(session.run(secret), name="listen")
    with _ended_by_signals(running), contextlib.suppress(asyncio.CancelledError):
        await running


@contextlib.contextmanager
def _ended_by_signals(task: asyncio.Task[Any]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


class Session:
    """One run of the command."""

    def __init__(self, api: Api, signer: Signer, url: str | None, query: dict[str, str], voice: Voice) -> None:
        self._api = api
        self._signer = signer
        self._url = url
        self._query = query
        self._voice = voice
        self._place = ""
        self._seen: dict[str, None] = {}
        self._room = asyncio.Semaphore(IN_FLIGHT_MAX)
        self._count = self._failed = 0

    async def run(self, secret: str) -> None:
        """Listen until cancelled. Raises Failure when the first connection cannot be made, or none ever will."""
        import aiohttp

        # No proxy and no cookies: to the server next door, as the dispatcher would.
        async with aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(), timeout=aiohttp.ClientTimeout(total=TIMEOUT_S), auto_decompress=False
        ) as local:
            try:
                async with asyncio.TaskGroup() as tasks:
                    await self._listen(local, tasks, secret)
            except ExceptionGroup as group:
                raise group.exceptions[0] from None
            finally:
                self._voice.say_goodbye(self._count, self._failed)

    async def _listen(self, local: aiohttp.ClientSession, tasks: asyncio.TaskGroup, secret: str) -> None:
        failures, was_ready = 0, False
        while True:
            try:
                async for received in self._received():
                    failures = 0
                    if received is None:
                        self._voice.say_connected(self._api.url, self._url, secret, again=was_ready)
                        was_ready = True
                        continue
                    await self._room.acquire()
                    tasks.create_task(self._handle(local, received), name="forward")
                reason = "the API closed the connection"
            except Failure as failure:
                if not was_ready or failure.exit_code in (UNAUTHORISED, MISUSED):
                    raise
                reason = failure.message
                if "Last-Event-ID" in reason:  # retention was faster, or it is another database
                    self._place, reason = "", "the last event is not kept any more: some may be missing"
            low, high = BACKOFF_S
            delay_s = random.uniform(0.5, 1.0) * min(high, low * 2 ** min(failures, 10))  # noqa: S311  jitter is no secret
            failures += 1
            self._voice.say_lost(reason, delay_s)
            await asyncio.sleep(delay_s)

    async def _received(self) -> AsyncIterator[Received | None]:
        """None once we are connected, then each event. Raises Failure."""
        headers = {"Last-Event-ID": self._place} if self._place else {}
        messages = Messages()
        async for block in self._api.stream("listen", query=self._query, headers=headers, silence_s=SILENCE_S):
            if block is None:
                yield None
                continue
            for message in messages.feed(block):
                if (received := self._understood(message)) is not None:
                    yield received

    def _understood(self, message: dict[str, str]) -> Received | None:
        """The event, unless it came before: the place to go on from may lie before some that were read."""
        body = message["data"].encode()
        place = message.get("id", "")
        try:
            event_id = str(json.loads(body)["id"])
        except (ValueError, LookupError, TypeError):
            raise Failure(f"{self._api.url} sent something that is no event: is that the API?") from None
        if place:
            self._place = place
            if event_id in self._seen:
                return None
            self._seen[event_id] = None
            if len(self._seen) > SEEN_MAX:
                del self._seen[next(iter(self._seen))]
        return Received(place, message.get("event", "message"), event_id, body)

    async def _handle(self, local: aiohttp.ClientSession, received: Received) -> None:
        try:
            self._count += 1
            self._voice.say_event(received)
            if self._url is not None:
                await self._forward(local, self._url, received)
        finally:
            self._room.release()

    async def _forward(self, local: aiohttp.ClientSession, url: str, received: Received) -> None:
        import aiohttp

        from dispatcher.cli.client import reason_of

        start = time.perf_counter()
        status, error = 0, ""
        try:
            async with local.post(
                url,
                data=received.body,
                headers=dict(self._headers(received)),
                skip_auto_headers=("Accept", "Accept-Encoding"),
                allow_redirects=False,
            ) as response:
                status = response.status
                await _read_through(response)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as problem:
            error = reason_of(problem)
        self._failed += not 200 <= status < 300 or bool(error)
        self._voice.say_answer(received, url, status, error, (time.perf_counter() - start) * 1e3)

    def _headers(self, received: Received) -> Iterable[tuple[str, str]]:
        at, id_ = str(int(time.time())), received.event_id
        yield "Content-Type", "application/json"
        yield "User-Agent", "TrackPost-Webhooks/1.0"
        yield "X-Trackpost-Event", received.type
        yield "X-Trackpost-Delivery", f"dlv_{secrets.token_hex(16)}"
        yield "X-Trackpost-Attempt", "1"
        yield "X-Trackpost-Signature", self._signer.legacy(received.body).decode()
        yield "webhook-id", id_
        yield "webhook-timestamp", at
        yield "webhook-signature", self._signer.standard(id_.encode(), at.encode(), received.body).decode()


class Voice:
    """What the command says: lines for people, a JSON document a line for programs."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json

    def say_connected(self, api: str, forward_to: str | None, secret: str, *, again: bool) -> None:
        """The stream has begun, for the first time or again."""
        if self._as_json:
            found = {"kind": "connected", "api": api, "forward_to": forward_to, "secret": secret, "again": again}
            print_json(found, on_one_line=True)
        elif again:
            click.echo(_soft(f"{_clock()}  connected again"))
        else:
            where = f", forwarding to {printable(forward_to)}" if forward_to else ""
            click.echo(f"Listening to {printable(api)}{where}. Ctrl-C ends.")
            click.echo(f"Signing secret of this run: {_bold(secret)}")

    def say_lost(self, reason: str, delay_s: float) -> None:
        """It has ended; when it is tried again."""
        if self._as_json:
            print_json({"kind": "lost", "reason": reason, "again_in_s": round(delay_s, 1)}, on_one_line=True)
        else:
            text = f"{_clock()}  connection lost: {printable(reason)}; again in {delay_s:.1f} s"
            click.echo(click.style(text, fg="yellow") if not is_plain() else text)

    def say_event(self, received: Received) -> None:
        """An event came."""
        if self._as_json:
            found = {"kind": "event", "type": received.type, "id": received.event_id, "again": not received.place}
            print_json(found | {"event": json.loads(received.body)}, on_one_line=True)
        else:
            again = "" if received.place else _soft("  (sent again)")
            click.echo(f"{_clock()}  --> {_bold(printable(received.type))}  {printable(received.event_id)}{again}")

    def say_answer(self, received: Received, url: str, status: int, error: str, duration_ms: float) -> None:
        """The local server answered, or did not."""
        if self._as_json:
            found = {"kind": "answer", "id": received.event_id, "type": received.type, "url": url}
            outcome = {"status": status or None, "error": error or None, "duration_ms": round(duration_ms, 1)}
            print_json(found | outcome, on_one_line=True)
            return
        is_good = 200 <= status < 300 and not error
        what = str(status) if not error else f"{status or ''} {printable(error)}".strip()
        shown = what if is_plain() else click.style(what, fg="green" if is_good else "red")
        hint = ""
        if status in (401, 403):
            hint = _soft("  wrong secret, or the other --body-style?")
        click.echo(f"{_clock()}  <-- {shown}  {printable(received.event_id)}  {duration_ms:.0f} ms{hint}")

    def say_goodbye(self, count: int, failed: int) -> None:
        """The end."""
        if not self._as_json:
            events = "1 event" if count == 1 else f"{count} events"
            click.echo(f"{events}, {failed} not accepted" if failed else events)


async def _read_through(response: aiohttp.ClientResponse) -> None:
    """To the end of the answer, as the dispatcher does, or as far as it would."""
    left = ANSWER_BYTES_MAX
    async for block in response.content.iter_any():
        left -= len(block)
        if left <= 0:
            return


def _clock() -> str:
    return datetime.now(UTC).astimezone().strftime("%H:%M:%S")


def _soft(text: str) -> str:
    return text if is_plain() else click.style(text, fg="bright_black")


def _bold(text: str) -> str:
    return text if is_plain() else click.style(text, bold=True)
