"""`dispatcher run` as a process of its own: started, asked, signalled and waited for by the tests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest

from dispatcher.store.database import TROUBLE

PATIENCE_S = 60.0  # for what must happen; nothing here asserts how fast
DISPATCHER = [sys.executable, "-c", "from dispatcher.cli.operator import main; main()"]


async def until(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> None:
    try:
        async with asyncio.timeout(patience_s):
            while not condition():  # the condition lies in another process or on a socket
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail(f"waited {patience_s} s for {what}")


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


class Program:
    """One `dispatcher run` as a process of its own. Without a DSN it keeps an embedded PostgreSQL in `directory`."""

    def __init__(self, directory: Path, dsn: str | None, **settings: str) -> None:
        self.api, self.metrics = free_address(), free_address()
        self.log = directory / f"{self.api}.log"
        self.environment = {
            **os.environ,
            **({"DISPATCHER_DATABASE_DSN": dsn} if dsn else {}),
            "DISPATCHER_STATE_DIRECTORY": str(directory),
            "DISPATCHER_SERVER_LISTEN": self.api,
            "DISPATCHER_METRICS_LISTEN": self.metrics,
            "DISPATCHER_NETWORK_ALLOW": "127.0.0.0/8",
            "DISPATCHER_NETWORK_ALLOW_HTTP": "true",
            "DISPATCHER_RETRY_SCHEDULE": "1s,1s",
            **settings,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str, **how: Any) -> None:
        """Run it; `how` is Popen's."""
        with self.log.open("ab") as log:
            streams = {"stdout": log, "stderr": log} | how
            self.process = subprocess.Popen([*DISPATCHER, "run", *arguments], env=self.environment, **streams)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def end(self) -> None:
        """Have it gone, whatever state it is in."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()

    @property
    def name(self) -> str:
        """What it calls itself in User-Agent, where the test has given it a name."""
        return self.environment["DISPATCHER_BRAND_USER_AGENT"]

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    async def ended(self) -> int:
        process = self.process
        assert process is not None
        await until(lambda: process.poll() is not None, "the daemon to end")
        return int(process.returncode)

    async def status(self, path: str = "/readyz") -> tuple[int, str]:
        try:
            async with aiohttp.ClientSession() as session, session.get(f"http://{self.metrics}{path}") as answer:
                return answer.status, await answer.text()
        except aiohttp.ClientError as error:
            return 0, str(error)

    async def is_ready(self, *, role: str = "active") -> None:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                status, text = await self.status()
                if status == 200 and role in text:
                    return
                assert self.runs, self.log.read_text()
                await asyncio.sleep(0.05)

    async def is_unready(self) -> str:
        """Wait until it says that it cannot do its work; return how it says that."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                status, text = await self.status()
                if status == 503:
                    return text
                assert self.runs, self.log.read_text()
                await asyncio.sleep(0.02)


async def subscribe(dsn: str, program: Program, webhooks: dict[str, dict[str, Any]]) -> None:
    """Register webhooks over the API, each a URL and what else is said of it, with a key made by the command."""
    key = await asyncio.to_thread(make_key, dsn)
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session:
        for url, more in webhooks.items():
            body = {"url": url, "events": ["*"], **more}
            while True:
                async with session.post(f"http://{program.api}/v1/webhooks", json=body) as answer:
                    if answer.status != 429:
                        assert answer.status == 201, await answer.text()
                        break
                await asyncio.sleep(float(answer.headers["Retry-After"]))


def make_key(dsn: str) -> str:
    done = subprocess.run(
        [*DISPATCHER, "keys", "create", "--account", "default", "--json"],
        env={**os.environ, "DISPATCHER_DATABASE_DSN": dsn},
        capture_output=True,
        check=True,
    )
    return str(json.loads(done.stdout)["key"])


@contextlib.asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def reached(dsn: str) -> AsyncIterator[Any]:
    """A connection as soon as there is one to be had: the server may be starting or recovering."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                connection = await asyncpg.connect(dsn)
                break
            except TROUBLE:
                await asyncio.sleep(0.02)
    try:
        yield connection
    finally:
        connection.terminate()


async def emit(connection: Any, count: int) -> list[str]:
    rows = await connection.fetch(
        "SELECT dispatcher.emit('email.sent', json_build_object('n', n)) FROM generate_series(1, $1::int) n", count
    )
    return [row[0] for row in rows]
