"""The processes a run is made of, each ended by its id: modules of this package that take orders, and the daemon."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Final

from bench import machine

START_S: Final = 60.0
STOP_S: Final = 60.0
DISPATCHER: Final = (sys.executable, "-c", "from dispatcher.cli.operator import main; main()")
STREAM_BYTES_MAX: Final = 1 << 24


class Broken(Exception):
    """The apparatus did not do its part: there is no run to judge."""


class Process:
    """A child that is spoken to in lines of JSON."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self._process = process
        self._name = name
        self.pid = process.pid

    @classmethod
    async def start(cls, *arguments: str) -> Process:
        """Start a module of this package with the interpreter that runs this."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *arguments,
            stdin=pipe,
            stdout=pipe,
            limit=STREAM_BYTES_MAX,
            cwd=machine.ROOT,
            process_group=0,  # Ctrl-C is for the harness, which ends what it started
        )
        return cls(process, arguments[0])

    async def say(self, **order: object) -> None:
        """Send an order."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        await self._process.stdin.drain()

    async def hear(self, timeout_s: float = START_S) -> str:
        """The next line it says. Raises Broken when there is none."""
        assert self._process.stdout is not None
        async with asyncio.timeout(timeout_s):
            line = await self._process.stdout.readline()
        if not line:
            raise Broken(f"process {self.pid} ({self._name}) ended: {await self._process.wait()}")
        return line.decode().strip()

    def check(self) -> None:
        """Raise Broken if it has ended by itself."""
        if self._process.returncode is not None:
            raise Broken(f"process {self.pid} ({self._name}) ended: {self._process.returncode}")

    async def end(self) -> None:
        """Close its input, which ends it; kill it when it does not care."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(5):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


class Daemon:
    """`dispatcher run` with a configuration file."""

    def __init__(self, config: Path, listen: str, metrics: str, log: Path) -> None:
        self.config, self.listen, self.metrics, self.log = config, listen, metrics, log
        self._process: asyncio.subprocess.Process | None = None
        self._asked = False  # to end

    @property
    def pid(self) -> int | None:
        """Its process while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def check(self) -> None:
        """Raise Broken with the end of its log if it has ended by itself."""
        process = self._process
        if process is not None and process.returncode is not None and not self._asked:
            raise Broken(f"the daemon ended with {process.returncode}:\n{self.complaints}")

    @property
    def complaints(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-3000:]

    async def start(self) -> None:
        """Start it; `ready` waits until it works."""
        self._asked = False
        environment = {key: value for key, value in os.environ.items() if not key.startswith("DISPATCHER_")}
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *DISPATCHER,
                "run",
                "--config",
                str(self.config),
                stdout=log,
                stderr=log,
                env=environment,
                cwd=machine.ROOT,
                process_group=0,
            )

    async def ready(self) -> None:
        """Wait until it is active. Raises Broken with the end of its log."""
        deadline = time.monotonic() + START_S
        while (
            "200" not in (answer := await _get(self.metrics, "/readyz")).partition("\r\n")[0] or "active" not in answer
        ):
            self.check()
            if time.monotonic() > deadline:
                raise Broken(f"the daemon did not get ready:\n{self.complaints}")
            await asyncio.sleep(0.02)

    async def get(self, path: str) -> None:
        """Ask API or dashboard for what needs no key. Raises Broken when it is not given."""
        status = (await _get(self.listen, path)).partition("\r\n")[0]
        if " 200 " not in status:
            raise Broken(f"the daemon answered {path} with {status!r}")

    async def stop(self) -> int:
        """Drain and end; return its exit code."""
        if self.pid is None:
            return 0
        assert self._process is not None
        self._asked = True
        self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_S):
                return await self._process.wait()
        except TimeoutError:
            await self.kill()
            return -1

    async def kill(self) -> None:
        """`kill -9`."""
        self._asked = True
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


async def _get(address: str, path: str) -> str:
    host, _, port = address.partition(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return ""
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
        async with asyncio.timeout(5):
            return (await reader.read()).decode(errors="replace")
    except (OSError, TimeoutError):
        return ""
    finally:
        writer.close()


def free_address() -> str:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
