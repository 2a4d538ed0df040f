"""What passes between the service manager and the daemon, with a manager of the test's own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from dispatcher import daemon, systemd
from dispatcher.daemon import Daemon
from dispatcher.snapshot import Snapshot

PATIENCE_S = 60.0
# As a service manager starts a service: sockets from descriptor 3 on, and the environment that names them.
START = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="api")
os.execv(sys.executable, [sys.executable, "-c", "from dispatcher.cli.operator import main; main()", "run"])
"""


class Manager:
    """The other end of `$NOTIFY_SOCKET`."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(PATIENCE_S)

    def told(self) -> dict[str, str]:
        """The next datagram."""
        return dict(line.split("=", 1) for line in self._socket.recv(4096).decode().split("\n"))

    def until(self, *keys: str) -> dict[str, str]:
        """The next datagram that has these keys."""
        give_up_at = time.monotonic() + PATIENCE_S
        while not set(keys) <= set(told := self.told()):
            assert time.monotonic() < give_up_at, f"nobody said {keys}"
        return told

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    it = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", it.path)
    yield it
    it.close()


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        it.listen()
        yield it


async def test_a_service_from_its_start_to_its_stop(
    manager: Manager, listening: socket.socket, database: str, tmp_path: Path
) -> None:
    """READY when ready, on the socket it was given; says how it is, that it reloads, that it stops and for how long."""
    environment = {
        **os.environ,
        "DISPATCHER_DATABASE_DSN": database,
        "DISPATCHER_STATE_DIRECTORY": str(tmp_path),
        "DISPATCHER_SERVER_LISTEN": "192.0.2.1:80",  # nobody may listen there: the socket takes its place
        "DISPATCHER_METRICS_LISTEN": "127.0.0.1:0",
        "DISPATCHER_DELIVERY_DRAIN_S": "77",
        "WATCHDOG_USEC": "200000",
    }
    environment.pop("WATCHDOG_PID", None)
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(listening.fileno())], env=environment, pass_fds=[listening.fileno()]
    )
    try:
        ready = await asyncio.to_thread(manager.until, "READY")
        assert ready == {"READY": "1", "STATUS": "active"}
        port = listening.getsockname()[1]
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/v1/webhooks") as answer:
            assert answer.status == 401
        status = await asyncio.to_thread(manager.until, "STATUS")
        assert status["STATUS"] == "active: 0 queued, 0 in flight, 0 retries waiting"
        process.send_signal(signal.SIGHUP)
        begun = await asyncio.to_thread(manager.until, "RELOADING")
        assert int(begun["MONOTONIC_USEC"]) > 0
        assert await asyncio.to_thread(manager.until, "READY") == {"READY": "1"}
        process.send_signal(signal.SIGTERM)
        stopping = await asyncio.to_thread(manager.until, "STOPPING")
        assert stopping["EXTEND_TIMEOUT_USEC"] == str(87 * 10**6)
        assert stopping["STATUS"].startswith("draining")
        assert await asyncio.to_thread(process.wait, PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()


async def test_the_watchdog_is_fed_by_progress_and_not_by_time(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    now = Snapshot(role="active", database=True)
    config = types.SimpleNamespace(database=types.SimpleNamespace(dsn="postgresql://h/d"))
    engine = types.SimpleNamespace(settled=True, role="active", snapshot=lambda: now)
    running: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    it: Any = Daemon(config, engine, None, None, None, "http://x")  # type: ignore[arg-type]
    announcing = asyncio.create_task(daemon._announce(it, running, None))  # type: ignore[arg-type]
    try:
        await asyncio.to_thread(manager.until, "WATCHDOG")
        now = Snapshot(role="active", database=True, progress_age_s=99.0)
        told = [await asyncio.to_thread(manager.told) for _ in range(20)]
        assert not any("WATCHDOG" in each for each in told[-5:]), "fed although nothing moves"
        it.stopping = True  # nothing is read any more, and that is right
        assert (await asyncio.to_thread(manager.until, "WATCHDOG"))["STATUS"].startswith("draining")
        now, it.stopping = Snapshot(database=False), False
        while "database away" not in (await asyncio.to_thread(manager.told))["STATUS"]:
            pass
    finally:
        announcing.cancel()


@pytest.mark.parametrize("pid", ["", "1", "x"])
def test_sockets_of_another_process_are_left_alone(pid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", pid)
    assert systemd.take_sockets() == []


def test_without_names_and_with_too_many_every_socket_is_taken(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        first = _adjacent(listening, other)
        monkeypatch.setattr(systemd, "FIRST_PASSED", first)
        for names, expected in (("metrics", ["metrics", ""]), ("a:b:c", ["a", "b"])):
            for name, value in (("FDS", "2"), ("PID", str(os.getpid())), ("FDNAMES", names)):
                monkeypatch.setenv(f"LISTEN_{name}", value)
            taken = systemd.take_sockets()
            assert [name for name, _ in taken] == expected
            assert [each.getsockname() for _, each in taken] == [listening.getsockname(), other.getsockname()]
            assert not any(os.get_inheritable(each.detach()) for _, each in taken)
            assert systemd.take_sockets() == [], "they are taken once"
        os.closerange(first, first + 2)


def _adjacent(*sockets: socket.socket) -> int:
    """Duplicates of them at descriptors that follow each other."""
    first = 200
    for number, each in enumerate(sockets):
        os.dup2(each.fileno(), first + number)
    return first


def test_nobody_is_told_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not systemd.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/socket")
    assert not systemd.notify("READY=1")


@pytest.mark.parametrize(
    ("usec", "pid", "expected"),
    [("30000000", None, 15.0), ("30000000", "1", None), ("", None, None), ("soon", None, None)],
)
def test_the_watchdog_is_ours_or_nobodys(
    usec: str, pid: str | None, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", pid or "")
    assert systemd.watchdog_s() == expected
