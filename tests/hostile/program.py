"""`dispatcher run` as a process of its own, among hostile neighbours."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
from arena import PATIENCE_S

DISPATCHER = [sys.executable, "-c", "from dispatcher.cli.operator import main; main()"]


class Program:
    """One daemon, its settings, and whoever calls its API."""

    def __init__(self, directory: Path, dsn: str, **settings: str) -> None:
        self.api, self.metrics = (f"http://127.0.0.1:{_free_port()}" for _ in range(2))
        self.log = directory / "daemon.log"
        self.environ = {
            **os.environ,
            "DISPATCHER_DATABASE_DSN": dsn,
            "DISPATCHER_STATE_DIRECTORY": str(directory),
            "DISPATCHER_SERVER_LISTEN": self.api.removeprefix("http://"),
            "DISPATCHER_METRICS_LISTEN": self.metrics.removeprefix("http://"),
            "DISPATCHER_NETWORK_ALLOW": "127.0.0.0/8",
            "DISPATCHER_NETWORK_ALLOW_HTTP": "true",
            "DISPATCHER_RETRY_SCHEDULE": "[]",
            **settings,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.key = ""

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*DISPATCHER, "run"], env=self.environ, stderr=log, stdout=log)

    async def is_ready(self) -> None:
        assert self.process is not None
        async with asyncio.timeout(PATIENCE_S):
            while '"role":"active"' not in (await self.page("/readyz"))[1]:
                assert self.process.poll() is None, self.log.read_text()
                await asyncio.sleep(0.05)

    async def command(self, *arguments: str) -> tuple[int, str]:
        """Run one of the operator's commands; return its exit code and all it said."""
        done = await asyncio.to_thread(
            subprocess.run, [*DISPATCHER, *arguments], env=self.environ, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    async def page(self, path: str) -> tuple[int, str]:
        """What the metrics listener says."""
        try:
            async with aiohttp.ClientSession() as session, session.get(self.metrics + path) as answer:
                return answer.status, await answer.text()
        except aiohttp.ClientError as error:
            return 0, str(error)

    async def ask(self, method: str, path: str, body: Any = None, *, key: str | None = None) -> tuple[int, str]:
        if not self.key:
            code, said = await self.command("keys", "create", "--account", "default", "--json")
            assert code == 0, said
            self.key = json.loads(said)["key"]
        headers = {"Authorization": f"Bearer {key or self.key}"}
        async with (
            aiohttp.ClientSession(self.api, headers=headers) as session,
            session.request(method, path, **({} if body is None else {"json": body})) as answer,
        ):
            return answer.status, await answer.text()

    async def end(self) -> int:
        """Ask it to end; return its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return await self.ended()

    async def ended(self) -> int:
        """Wait until it ends by itself."""
        assert self.process is not None
        return await asyncio.to_thread(self.process.wait, PATIENCE_S)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
