"""A disk that is full, PostgreSQL's or the log's: the daemon says so, waits, and goes on once there is room."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from daemons import connected, until
from servers import Server
from siege import Siege

from dispatcher import embedded
from dispatcher.embedded import EmbeddedPostgres
from dispatcher.store.database import TROUBLE

SMALL = {"min_wal_size": "32MB", "max_wal_size": "48MB", "shared_buffers": "16MB"}
DISK_MB = 200  # a fresh cluster takes 60, and its WAL 80 before any of it is given back
LOAD = 60
FULL = Path("/dev/full")


class Disk:
    """A small file system of the test's own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self) -> None:
        with contextlib.suppress(OSError), self._ballast.open("ab", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    def free(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", path], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a file system of its own takes root and the right to mount: {done.stderr.strip()}")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture
async def server(disk: Disk) -> AsyncIterator[Server]:
    server = Server(disk.path / "postgres", **SMALL)
    yield server
    await asyncio.to_thread(server.stop)


async def exhaust_wal(server: EmbeddedPostgres) -> None:
    """Have PostgreSQL begin segments of its WAL until there is no room for one, of which it dies."""
    with contextlib.suppress(*TROUBLE):
        async with connected(server.dsn) as connection:
            while True:
                await connection.execute("SELECT pg_logical_emit_message(false, 'ballast', 'x'), pg_switch_wal()")


async def test_postgresqls_disk_is_full_and_has_room_again(
    disk: Disk, server: Server, besiege: Callable[[str], Siege]
) -> None:
    siege = besiege(await server.with_schema())
    subscribers, troubles = siege.subscribers, siege.application.troubles
    daemon = await siege.serving()
    async with siege.application.writing():
        await until(lambda: len(subscribers.arrivals) > LOAD, "the load to be under way")
        disk.fill()
        await until(troubles.total, "writes to fail")
        assert (await daemon.status("/healthz"))[0] == 200
        disk.free()
        await asyncio.to_thread(server.start)  # if it was the WAL that had no room
        await daemon.is_ready()
        wanted = len(subscribers.arrivals) + LOAD
        await until(lambda: len(subscribers.arrivals) > wanted, "deliveries to go on")

        disk.fill()
        await exhaust_wal(server)
        assert "database" in await daemon.is_unready()
        assert (await daemon.status("/healthz"))[0] == 200
        disk.free()
        await asyncio.to_thread(server.start)
        await daemon.is_ready()
    siege.tell(f"{await siege.proof.holds()}; {dict(troubles)}")
    assert "database.lost" in daemon.log.read_text()
    daemon.signal(signal.SIGTERM)
    assert await daemon.ended() == 0


async def test_the_embedded_postgresqls_disk_is_full_and_has_room_again(
    disk: Disk, besiege: Callable[[str], Siege], tmp_path: Path
) -> None:
    with EmbeddedPostgres(disk.path / "postgres") as server:  # joined by the daemon, which starts it anew when it dies
        siege = besiege(server.dsn)
        daemon = siege.daemon(DISPATCHER_STATE_DIRECTORY=str(disk.path))
        del daemon.environment["DISPATCHER_DATABASE_DSN"]
        daemon.start()
        await daemon.is_ready()
        await siege.proof.subscribe(daemon)
        async with siege.application.writing():
            await until(lambda: len(siege.subscribers.arrivals) > LOAD, "the load to be under way")
            disk.fill()
            await exhaust_wal(server)
            await until(lambda: "embedded_postgres_in_trouble" in daemon.log.read_text(), "a start to fail")
            await daemon.is_unready()
            disk.free()
            await daemon.is_ready()
        siege.tell(await siege.proof.holds())
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        await asyncio.to_thread(server.start)  # attach to the one that the daemon launched
        launched_anew = server.pid
    assert launched_anew
    assert not embedded._alive(launched_anew), "the last user stops the server, whoever launched it"


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
async def test_a_log_on_a_full_disk_stops_nothing_and_is_counted(siege: Siege) -> None:
    with FULL.open("wb") as full:
        daemon = await siege.serving(start={"stdout": full, "stderr": full}, DISPATCHER_LOG_LEVEL="debug")
    async with siege.application.writing():
        await until(lambda: len(siege.subscribers.arrivals) > LOAD, "the load to be under way")
        daemon.signal(signal.SIGHUP)
    siege.tell(await siege.proof.holds())
    _, metrics = await daemon.status("/metrics")
    (dropped,) = [line for line in metrics.splitlines() if line.startswith("dispatcher_log_lines_dropped_total ")]
    assert float(dropped.split()[1]) > 0
    daemon.signal(signal.SIGTERM)
    assert await daemon.ended() == 0
