"""Releases of the program, this one and the first, run as processes on one database."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import aiohttp
import pytest
from daemons import PATIENCE_S, free_address, until

ROOT = Path(__file__).resolve().parent.parent
FIRST_REVISION = "6ee75f9cbd82"  # the last one whose newest migration is 0002


class Release:
    """A release of the program, run as processes on one database."""

    def __init__(self, tree: Path, state: Path, dsn: str) -> None:
        self._tree, self._state, self._dsn = tree, state, dsn
        self.processes: list[subprocess.Popen[bytes]] = []

    def _environment(self, api: str, metrics: str) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(self._tree),
            "DISPATCHER_DATABASE_DSN": self._dsn,
            "DISPATCHER_STATE_DIRECTORY": str(self._state),
            "DISPATCHER_SERVER_LISTEN": api,
            "DISPATCHER_METRICS_LISTEN": metrics,
            "DISPATCHER_NETWORK_ALLOW": "127.0.0.0/8",
            "DISPATCHER_NETWORK_ALLOW_HTTP": "true",
            "DISPATCHER_RETRY_SCHEDULE": "1s,1s",
        }

    def start(self, *arguments: str, metrics: str = "") -> subprocess.Popen[bytes]:
        code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from dispatcher.cli.operator import main; main()"
        command = [sys.executable, "-c", code, str(self._tree), *arguments]
        log = self._state / f"{self._tree.name}-{arguments[0]}-{len(self.processes)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, env=self._environment(free_address(), metrics or free_address()), stdout=out, stderr=out,
                cwd=self._state,
            )  # fmt: skip
        self.processes.append(process)
        process.log = log  # type: ignore[attr-defined]
        return process

    async def act(self, *arguments: str, patience_s: float = PATIENCE_S) -> tuple[int, str]:
        """Run a command to its end; return its exit code and all it said."""
        process = self.start(*arguments)
        await until(lambda: process.poll() is not None, " ".join(arguments), patience_s)
        return process.returncode, process.log.read_text()  # type: ignore[attr-defined]

    async def run(self, role: str) -> subprocess.Popen[bytes]:
        """A daemon that has become `role`."""
        metrics = free_address()
        process = self.start("run", metrics=metrics)
        async with aiohttp.ClientSession() as session, asyncio.timeout(PATIENCE_S):
            while True:
                assert process.poll() is None, process.log.read_text()  # type: ignore[attr-defined]
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"http://{metrics}/readyz") as answer:
                        if answer.status == 200 and role in await answer.text():
                            return process
                await asyncio.sleep(0.02)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def unpack_first_release(directory: Path) -> Path:
    """The program's tree as it was first released, out of this repository's history."""
    command = ["git", "-C", str(ROOT), "archive", FIRST_REVISION, "dispatcher"]
    archive = subprocess.run(command, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip(f"revision {FIRST_REVISION} is not in this tree's history: a source archive or a shallow clone")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(directory, filter="data")
    return directory
