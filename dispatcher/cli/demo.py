"""`dispatcher demo`: the whole program at work on one page, with nothing to install and nothing left behind.

Everything is what an operator and a customer would do themselves: the daemon runs as `dispatcher run` runs it, webhooks
are registered over the REST API, events are written by SQL in transactions of their own. Only PostgreSQL is of the kind
that is thrown away, and loopback addresses are allowed, because the receiver is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import click

from dispatcher import daemon
from dispatcher.cli.client import Api
from dispatcher.cli.output import FAILED, INTERRUPTED, complain, is_plain, print_json, printable
from dispatcher.cli.receiver import HANDLERS, STANDARD_VERIFIER, Landing, Receiver
from dispatcher.config import Config, load
from dispatcher.core.catalogue import Catalogue
from dispatcher.errors import ConfigurationError
from dispatcher.logs import start_logging
from dispatcher.model import DEFAULT_ACCOUNT
from dispatcher.store.database import connect

PORT: Final = 8480
METRICS_PORT: Final = 9464
PATIENCE_S: Final = 60.0  # for all deliveries together; they take a few milliseconds each
PAUSE_S: Final = 0.03  # between two events, so that each is seen to arrive by itself
DRAIN_S: Final = 2
POLL_S: Final = 0.02
WIDTH: Final = 104  # of a whole line
ID_WIDTH: Final = 36
ID_SHOWN: Final = 8


async def show(*, once: bool, port: int | None, as_json: bool) -> int:
    """Run the demonstration and return the exit code."""
    demonstration = asyncio.create_task(_Demonstration(once=once, port=port, as_json=as_json).run(), name="demo")
    with _cancelled_by_signals(demonstration):
        try:
            return await demonstration
        except asyncio.CancelledError:
            return INTERRUPTED if once else 0


@contextlib.contextmanager
def _cancelled_by_signals(task: asyncio.Task[Any]) -> Iterator[None]:
    """The first Ctrl-C ends the task; others, while it tidies up within DRAIN_S, change nothing."""
    loop, asked = asyncio.get_running_loop(), False

    def stop() -> None:
        nonlocal asked
        if not asked:
            asked = True
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


class _Demonstration:
    """One run of it."""

    def __init__(self, *, once: bool, port: int | None, as_json: bool) -> None:
        self._once = once
        self._port = port
        self._as_json = as_json
        self._receiver = Receiver()
        self._committed: dict[
            str, float
        ] = {}  # by event id: when its transaction was about to commit, by time.perf_counter()
        self._landed: dict[tuple[str, str], bool] = {}  # by event and handler: whether its signatures were genuine

    async def run(self) -> int:
        async with contextlib.AsyncExitStack() as stack:
            directory = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="dispatcher-demo-", ignore_cleanup_errors=True)
            )
            began = time.monotonic()
            config = self._config(directory)
            start_logging(config.log)
            config = await stack.enter_async_context(daemon.database(config, ephemeral=True))
            database = await connect(config.database.dsn, name="dispatcher demo")
            stack.push_async_callback(database.close, timeout=DRAIN_S)
            await stack.enter_async_context(self._receiver)
            running = await stack.enter_async_context(_running(config))
            _, key = await running.accounts.create_key(DEFAULT_ACCOUNT)
            await self._register(running.url, key)
            version = await database.fetchval("SHOW server_version")
            self._introduce(running, key, version, time.monotonic() - began)
            is_whole = await self._show_samples(running, database)
            if self._once:
                return 0 if is_whole else FAILED
            self._suggest(running, config, key)
            while True:
                await self._show_next()

    def _config(self, directory: str) -> Config:
        """Everything of the machine's own configuration is left out, but for where PostgreSQL is found."""
        environ = {
            "DISPATCHER_STATE_DIRECTORY": directory,
            "DISPATCHER_SERVER_LISTEN": f"127.0.0.1:{self._free_port()}",
            "DISPATCHER_METRICS_LISTEN": f"127.0.0.1:{METRICS_PORT if _is_free(METRICS_PORT) else 0}",
            "DISPATCHER_NETWORK_ALLOW": "127.0.0.0/8",
            "DISPATCHER_NETWORK_ALLOW_HTTP": "true",
            "DISPATCHER_DELIVERY_DRAIN_S": str(DRAIN_S),
            "DISPATCHER_LOG_LEVEL": "warning",
        }
        binaries = {name: os.environ[name] for name in ("DISPATCHER_EMBEDDED_BIN",) if name in os.environ}
        return load(None, environ | binaries, system_file=Path(os.devnull) / "none")

    def _free_port(self) -> int:
        if self._port is not None:
            if self._port and not _is_free(self._port):
                raise ConfigurationError([f"--port {self._port}: cannot listen on 127.0.0.1:{self._port}: it is taken"])
            return self._port
        if _is_free(PORT):
            return PORT
        self._say(f"Port {PORT} is taken, so the API listens on a free one.")
        return 0

    # ── what a customer does ───────────────────────────────────────────────────────────────────────────────────────

    async def _register(self, url: str, key: str) -> None:
        """Each handler of the receiver as a webhook, by the API; the secrets are those the API makes."""
        async with Api(url, key) as api:
            for name in HANDLERS:
                webhook = await api.call(
                    "POST",
                    "webhooks",
                    body={
                        "url": f"{self._receiver.url}/{name}",
                        "events": ["*"],
                        "description": f"the demo's receiver, verifying as the {name.title()} example does",
                        "body_style": "python" if name == "flask" else "compact",
                    },
                )
                self._receiver.secrets[name] = webhook["secret"]

    # ── what an application does ───────────────────────────────────────────────────────────────────────────────────

    async def _emit(self, types: Catalogue, database: Any) -> None:
        """One sample of each type."""
        for entry in types:
            async with database.transaction():
                event_id = await database.fetchval(
                    "INSERT INTO dispatcher.outbox (type, data) VALUES ($1, $2) RETURNING id",
                    entry.name,
                    json.dumps(entry.sample),
                )
                self._committed[event_id] = time.perf_counter()
            await asyncio.sleep(PAUSE_S)

    # ── what comes of it ───────────────────────────────────────────────────────────────────────────────────────────

    async def _show_samples(self, running: daemon.Daemon, database: Any) -> bool:
        """Emit and show; return whether every sample was delivered to every handler with genuine signatures."""
        types = daemon.catalogue_of(running.config)
        wanted = len(types) * len(HANDLERS)
        emitting = asyncio.create_task(self._emit(types, database), name="demo application")
        try:
            async with asyncio.timeout(PATIENCE_S):
                while len(self._landed) < wanted:
                    await self._show_next()
                await emitting
                if all(self._landed.values()):
                    await _delivered(running, wanted)
        except TimeoutError:
            complain(f"{len(self._landed)} of {wanted} deliveries were settled within {PATIENCE_S:g} s")
            return False
        finally:
            emitting.cancel()
        self._conclude(len(types))
        return all(self._landed.values())

    async def _show_next(self) -> None:
        """Wait for a delivery and show it."""
        landing = await self._receiver.landings.get()
        committed = self._committed.get(landing.event_id)
        self._print(landing, None if committed is None else landing.at_s - committed)
        if committed is not None:
            self._landed.setdefault((landing.event_id, landing.handler), landing.verified)

    # ── on the screen ──────────────────────────────────────────────────────────────────────────────────────────────

    def _say(self, text: str = "") -> None:
        """For people: not among the objects that programs read."""
        click.echo(text, err=self._as_json)

    def _styled(self, text: str, **style: Any) -> str:
        return text if is_plain() else click.style(text, **style)

    def _introduce(self, running: daemon.Daemon, key: str, version: str, took_s: float) -> None:
        self._say(f"PostgreSQL {version.partition(' ')[0]}, engine, API and dashboard are up after {took_s:.1f} s.")
        self._say(f"Dashboard: {self._styled(running.url, bold=True)}")
        self._say(f"API key to sign in with: {self._styled(key, bold=True)}")
        self._say(
            "Each delivery is verified twice: by printing the body again and hashing that, as the Express and Flask"
        )
        self._say(f"handlers of the guide do, and by Standard Webhooks ({STANDARD_VERIFIER}).")
        self._say()
        if not self._as_json:
            heading = _line("time", "event", "delivery", "handler", "after", "guide", "standard")
            self._say(self._styled(heading, dim=True))

    def _print(self, landing: Landing, latency_s: float | None) -> None:
        if self._as_json:
            print_json(_fields(landing, latency_s), on_one_line=True)
            sys.stdout.flush()
            return
        clock = time.strftime("%H:%M:%S", time.localtime(landing.at_unix_s)) + f".{landing.at_unix_s % 1:.3f}"[2:]
        again = f" (attempt {landing.attempt})" if landing.attempt != "1" else ""
        line = _line(
            clock,
            printable(landing.type),
            printable(landing.delivery_id),
            landing.handler,
            "–" if latency_s is None else f"{latency_s * 1e3:.1f} ms",
            self._verdict(landing.by_guide),
            self._verdict(landing.by_standard),
        )
        self._say(line + again)

    def _verdict(self, is_genuine: bool) -> str:
        if is_genuine:
            return self._styled("✓ ok ", fg="green")
        return self._styled("✗ BAD", fg="red", bold=True)

    def _conclude(self, types: int) -> None:
        landed, genuine = len(self._landed), sum(self._landed.values())
        self._say()
        if genuine == landed:
            text = f"{landed} deliveries of {types} event types: all delivered, both signatures of each verified."
            self._say(self._styled(text, fg="green", bold=True))
        else:
            complain(f"the signatures of {landed - genuine} of {landed} deliveries are not genuine")

    def _suggest(self, running: daemon.Daemon, config: Config, key: str) -> None:
        url, dsn = running.url, shlex.quote(config.database.dsn)
        metrics = config.metrics.listen
        self._say()
        self._say(f"  dashboard          {url}  (sign in with the API key)")
        self._say(f"  API                {url}/v1, described at {url}/docs")
        if not metrics.endswith(":0"):
            self._say(f"  metrics            http://{metrics}/metrics")
        self._say(f"  API key            {key}")
        self._say(
            f"""
In another terminal, as the customer:
  export TRACKPOST_API_URL={url} TRACKPOST_API_KEY={key}
  trackpost webhooks list
  trackpost trigger email.bounced --set data.reason='Mailbox full'
  curl -H "Authorization: Bearer $TRACKPOST_API_KEY" "$TRACKPOST_API_URL/v1/events?limit=3"

As the operator, and as the application:
  export DISPATCHER_DATABASE_DSN={dsn}
  dispatcher emit email.sent --data '{{"to": "user@example.com"}}'
  dispatcher status --watch
  psql "$DISPATCHER_DATABASE_DSN" -c "SELECT dispatcher.emit('email.opened', '{{}}')"

Ctrl-C ends it all; nothing stays behind."""
        )


async def _delivered(running: daemon.Daemon, wanted: int) -> None:
    """Wait until the engine has counted as many."""
    while running.engine.snapshot().deliveries["delivered"] < wanted:  # noqa: ASYNC110  a counter rings no bell
        await asyncio.sleep(POLL_S)


def _line(clock: str, *cells: str) -> str:
    """The columns of one line; a narrow terminal gets the end of the delivery's id only."""
    type_, delivery, handler, after, guide, standard = cells
    id_width = ID_WIDTH
    if sys.stdout.isatty() and shutil.get_terminal_size().columns < WIDTH:
        id_width = ID_SHOWN + 1
        delivery = delivery if len(delivery) <= id_width else f"…{delivery[-ID_SHOWN:]}"
    return f"{clock:<13}{type_:<18}{delivery:<{id_width}}  {handler:<9}{after:>8}  {guide}  {standard}"


def _fields(landing: Landing, latency_s: float | None) -> dict[str, Any]:
    return {
        "at": round(landing.at_unix_s, 3),
        "type": landing.type,
        "event_id": landing.event_id,
        "delivery_id": landing.delivery_id,
        "attempt": int(landing.attempt) if landing.attempt.isdecimal() else None,
        "handler": landing.handler,
        "latency_ms": None if latency_s is None else round(latency_s * 1e3, 3),
        "guide": landing.by_guide,
        "standard": landing.by_standard,
        "verified": landing.verified,
    }


@contextlib.asynccontextmanager
async def _running(config: Config) -> AsyncIterator[daemon.Daemon]:
    """The daemon, from when it is ready until it has drained."""
    ready: asyncio.Future[daemon.Daemon] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(daemon.run(config, on_ready=ready.set_result, signals=False), name="daemon")
    either: set[asyncio.Future[Any]] = {task, ready}
    whole = asyncio.current_task()
    assert whole is not None, "this runs in a task"

    def gone(_: asyncio.Task[None]) -> None:
        whole.cancel()  # without a daemon there is nothing to show

    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            await task
        task.add_done_callback(gone)
        yield ready.result()
    finally:
        task.remove_done_callback(gone)
        if ready.done():
            ready.result().stop()
        else:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as listeners do
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
