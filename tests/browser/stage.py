"""The whole program as a browser meets it: a daemon as a process of its own, and subscribers that answer as told."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from playwright.async_api import Browser, async_playwright

from dispatcher.store.accounts import AccountStore
from dispatcher.store.database import open_pool

PATIENCE_S = 30.0
DISPATCHER = [sys.executable, "-c", "from dispatcher.cli.operator import main; main()"]
OPERATOR_KEY = "operator-key-of-the-browser-tests"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium() -> str | None:
    """A browser on this machine: `$CHROMIUM`, else the first found by name."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.asynccontextmanager
async def browser(executable: str) -> AsyncIterator[Browser]:
    """A browser without a window, in a fresh profile."""
    async with async_playwright() as playwright:
        running = await playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield running
        await running.close()


Handler = Callable[[Mapping[str, str], bytes], tuple[int, bytes]]


class Subscriber:
    """Answers 200, or what `answers` has for the path, and remembers what it got."""

    def __init__(self) -> None:
        self.url = ""
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: dict[str, tuple[int, bytes] | Handler] = {}

    def at(self, path: str) -> list[tuple[dict[str, str], bytes]]:
        """What came to a path: header fields and body."""
        return [(headers, body) for where, headers, body in self.got if where == path]

    async def handle(self, request: web.Request) -> web.Response:
        headers, sent = dict(request.headers), await request.read()
        self.got.append((request.path, headers, sent))
        answer = self.answers.get(request.path, (200, b'{"received":true}'))
        status, body = answer if isinstance(answer, tuple) else answer(headers, sent)
        return web.Response(status=status, body=body, content_type="application/json", headers={"X-Served-By": "web-1"})


class Daemon:
    """The program as a process of its own."""

    def __init__(self, environ: Mapping[str, str], directory: Path) -> None:
        self.url = f"http://{environ['DISPATCHER_SERVER_LISTEN']}"
        self._environ = environ
        self._log = directory / "daemon.log"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Run it until it answers."""
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *DISPATCHER, "run", env=self._environ, stdout=log, stderr=log
            )
        await until(self._answers, "the daemon to answer")

    async def end(self, by: signal.Signals = signal.SIGTERM) -> None:
        """End it, gently or not."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(by)
        await self._process.wait()

    async def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.returncode is None, self._log.read_text()
        try:
            async with aiohttp.ClientSession() as session, session.get(f"{self.url}/sign-in") as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False


@dataclasses.dataclass
class Stage:
    """Everything that is running."""

    daemon: Daemon
    key: str
    subscriber: Subscriber
    pool: Any

    @property
    def url(self) -> str:
        """Where the dashboard is."""
        return self.daemon.url

    async def api(self, method: str, path: str, body: Any = None) -> Any:
        """Call the API as the account's program would."""
        headers = {"Authorization": f"Bearer {self.key}"}
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, f"{self.url}/v1{path}", json=body, headers=headers) as answer,
        ):
            assert answer.status < 400, await answer.text()
            return await answer.json() if answer.status != 204 else None

    async def webhook(self, path: str = "/ok", **settings: Any) -> dict[str, Any]:
        """A webhook of the subscriber's."""
        return dict(
            await self.api("POST", "/webhooks", {"url": self.subscriber.url + path, "events": ["*"], **settings})
        )

    async def emit(self, type_: str = "email.delivered", data: str = '{"email_id": "msg_def456"}') -> str:
        """An event by SQL, as an application writes it."""
        sql = "INSERT INTO dispatcher.outbox (account, type, data) VALUES ('acme', $1, $2) RETURNING id"
        return str(await self.pool.fetchval(sql, type_, data))

    async def delivery(self, webhook_id: str, state: str, event_id: str | None = None) -> dict[str, Any]:
        """The first delivery of a webhook that reaches a state."""
        found: list[dict[str, Any]] = []

        async def look() -> bool:
            query = f"?status={state}" + (f"&event_id={event_id}" if event_id else "")
            found[:] = (await self.api("GET", f"/webhooks/{webhook_id}/deliveries{query}"))["data"]
            return bool(found)

        await until(look, f"a delivery that is {state}")
        return found[0]


async def until(condition: Callable[[], Any], what: str) -> None:
    """Wait for what happens in another process."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not await condition():
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"waited {PATIENCE_S} s for {what}") from None


@contextlib.asynccontextmanager
async def stage(dsn: str, directory: Path, **settings: str) -> AsyncIterator[Stage]:
    """The program on a migrated database, with one account, acme."""
    subscriber = Subscriber()
    app = web.Application()
    app.router.add_post("/{path:.*}", subscriber.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    subscriber.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    pool = await open_pool(dsn, size=2)
    _, key = await AccountStore(pool).create_key("acme")
    environ = {
        **os.environ,
        "DISPATCHER_DATABASE_DSN": dsn,
        "DISPATCHER_STATE_DIRECTORY": str(directory),
        "DISPATCHER_SERVER_LISTEN": f"127.0.0.1:{_free_port()}",
        "DISPATCHER_SERVER_OPERATOR_KEY": OPERATOR_KEY,
        "DISPATCHER_METRICS_LISTEN": f"127.0.0.1:{_free_port()}",
        "DISPATCHER_NETWORK_ALLOW": "127.0.0.0/8",
        "DISPATCHER_NETWORK_ALLOW_HTTP": "true",
        **settings,
    }
    daemon = Daemon(environ, directory)
    try:
        await daemon.start()
        yield Stage(daemon, key, subscriber, pool)
    finally:
        await daemon.end()
        await pool.close()
        await runner.cleanup()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
