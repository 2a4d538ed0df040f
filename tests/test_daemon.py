"""The whole program from outside: real processes, real signals, a receiver that remembers every request."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import ClientSession, web
from daemons import PATIENCE_S, Program, connected, emit, free_address, subscribe, until

from dispatcher.embedded import EmbeddedPostgres
from dispatcher.store.accounts import AccountStore
from dispatcher.store.schema import migrate, written_for


class Receiver:
    """A subscriber: what it got, in order; `/hold` answers when `release` is set."""

    def __init__(self) -> None:
        self.got: list[tuple[str, str, int]] = []  # path, event id, attempt
        self.release = asyncio.Event()
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        await request.read()
        self.got.append((request.path, request.headers["webhook-id"], int(request.headers["X-Trackpost-Attempt"])))
        if request.path == "/hold":
            await self.release.wait()
        return web.Response(text="ok")

    def ids(self, path: str = "/hook") -> Counter[str]:
        return Counter(event for at, event, _ in self.got if at == path)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    it = Receiver()
    app = web.Application()
    app.router.add_post("/{name}", it.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    it.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield it
    it.release.set()
    await runner.cleanup()


@pytest.fixture
def program(tmp_path: Path, database: str) -> Iterator[Callable[..., Program]]:
    made: list[Program] = []

    def make(**settings: str) -> Program:
        made.append(Program(tmp_path, settings.pop("dsn", database), **settings))
        return made[-1]

    yield make
    for each in made:
        each.end()


async def serving(program: Callable[..., Program], at: str, url: str, **settings: str) -> Program:
    """A daemon that is ready, with one webhook for everything, on the database `at`."""
    daemon = program(**settings)
    daemon.start()
    await daemon.is_ready()
    await subscribe(at, daemon, {url: {}})
    return daemon


async def test_what_is_committed_arrives_and_what_is_rolled_back_does_not(
    program: Callable[..., Program], receiver: Receiver, database: str
) -> None:
    await serving(program, database, f"{receiver.url}/hook")
    async with connected(database) as application, connected(database) as slow:
        open_for_long = slow.transaction()
        await open_for_long.start()
        late = await emit(slow, 1)
        abandoned = application.transaction()
        await abandoned.start()
        never = await emit(application, 3)
        await abandoned.rollback()
        sent = await emit(application, 5)
        await until(lambda: set(sent) <= set(receiver.ids()), "committed events beside an open transaction")
        assert not set(late) & set(receiver.ids())
        await open_for_long.commit()
        await until(lambda: set(late) <= set(receiver.ids()), "the event of the long transaction")
    assert not set(never) & set(receiver.ids())
    assert set(receiver.ids().values()) == {1}


async def test_how_long_an_attempt_took_is_told_finer_than_in_milliseconds(
    program: Callable[..., Program], receiver: Receiver, database: str
) -> None:
    await serving(program, database, f"{receiver.url}/hook")
    async with connected(database) as application:
        for _ in range(5):
            await until_settled(application, len(await emit(application, 4)))
        took_us = await application.fetch("SELECT duration_us FROM dispatcher.attempt")
    assert min(row[0] for row in took_us) > 0
    assert any(100 < row[0] % 1000 < 900 for row in took_us)


async def test_a_delivery_that_waits_for_its_answer_is_shown_in_flight(
    program: Callable[..., Program], receiver: Receiver, database: str
) -> None:
    daemon = await serving(program, database, f"{receiver.url}/hold")
    async with connected(database) as application:
        _, key = await AccountStore(application).create_key("default")
        await emit(application, 1)

        async def ask(path: str) -> Any:
            call = asked.get(f"http://{daemon.api}/v1{path}", headers={"Authorization": f"Bearer {key}"})
            async with call as answer:
                return (await answer.json())["data"]

        async with ClientSession() as asked:
            [webhook] = await ask("/webhooks")
            listing = f"/webhooks/{webhook['id']}/deliveries"
            async with asyncio.timeout(10):
                while not (found := await ask(f"{listing}?status=in_flight")):  # in memory alone for two seconds
                    await asyncio.sleep(0.2)
            assert [(each["attempts"], each["next_attempt_at"]) for each in found] == [(0, None)]
            assert await ask(f"{listing}?status=pending") == []
            receiver.release.set()
            await until_settled(application, 1)
            [done] = await ask(listing)
            assert (done["id"], done["status"]) == (found[0]["id"], "delivered")


async def test_kill_9_in_mid_load_loses_nothing_and_repeats_no_more_than_was_out(
    program: Callable[..., Program], receiver: Receiver, database: str
) -> None:
    daemon = await serving(program, database, f"{receiver.url}/hook")
    committed: list[str] = []
    rounds = 4
    async with connected(database) as application:
        for _ in range(rounds):
            before = len(receiver.got)
            committed += await emit(application, 400)
            await until(lambda before=before: len(receiver.got) > before + 50, "the load to be under way")  # type: ignore[misc]
            daemon.signal(signal.SIGKILL)
            await daemon.ended()
            committed += await emit(application, 20)  # while nobody runs
            daemon.start()
        await until(lambda: set(committed) <= set(receiver.ids()), "every committed event")
        await until_settled(application, len(committed))
        twice = await application.fetchval(
            "SELECT count(*) FROM (SELECT FROM dispatcher.attempt WHERE state = 'delivered'"
            " GROUP BY event_seq, endpoint_id HAVING count(*) > 1) t"
        )
        assert twice == 0, "an outcome was logged twice"
    # Repeated may be what was in flight or not yet written down: at worst a round's own load, never an earlier round's.
    repeats = sum(receiver.ids().values()) - len(committed)
    assert repeats <= rounds * 400
    assert sum(receiver.ids()[event] > 0 for event in committed) == len(committed)


async def until_settled(connection: Any, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await connection.fetchval("SELECT count(*) FROM dispatcher.attempt WHERE state = 'delivered'") < count:
            await asyncio.sleep(0.05)
        while await connection.fetchval("SELECT count(*) FROM dispatcher.pending"):
            await asyncio.sleep(0.05)


async def test_a_standby_takes_over_when_the_first_daemon_is_killed(
    program: Callable[..., Program], receiver: Receiver, database: str
) -> None:
    first, second = program(), program()
    first.start()
    await first.is_ready()
    second.start()
    await second.is_ready(role="standby")
    await subscribe(database, second, {f"{receiver.url}/hook": {}})  # the API works on either
    async with connected(database) as application:
        for row in await application.fetch("SELECT role, snapshot ->> 'schema' AS schema FROM dispatcher.instance"):
            assert row["schema"] == str(written_for()), f"{row['role']}: would hold up what takes away from older ones"
        sent = await emit(application, 50)
        first.signal(signal.SIGKILL)
        sent += await emit(application, 50)
        await second.is_ready(role="active")
        await until(lambda: set(sent) <= set(receiver.ids()), "every event, by whichever daemon")


async def test_sigterm_waits_for_what_is_in_flight_and_settles_it(
    program: Callable[..., Program], receiver: Receiver, database: str
) -> None:
    daemon = await serving(program, database, f"{receiver.url}/hold")
    async with connected(database) as application:
        (event,) = await emit(application, 1)
        await until(lambda: receiver.ids("/hold")[event] == 1, "the request to be out")
        daemon.signal(signal.SIGTERM)
        await until(lambda: "draining" in daemon.log.read_text(), "the drain to begin")
        receiver.release.set()
        assert await daemon.ended() == 0
        assert await application.fetchval("SELECT state FROM dispatcher.attempt") == "delivered"
    assert receiver.ids("/hold")[event] == 1


async def test_a_second_signal_exits_at_once_and_loses_nothing(
    program: Callable[..., Program], receiver: Receiver, database: str
) -> None:
    daemon = await serving(program, database, f"{receiver.url}/hold")
    async with connected(database) as application:
        (event,) = await emit(application, 1)
        await until(lambda: receiver.ids("/hold")[event] == 1, "the request to be out")
        daemon.signal(signal.SIGINT)
        await until(lambda: "draining" in daemon.log.read_text(), "the drain to begin")
        daemon.signal(signal.SIGINT)
        assert await daemon.ended() != 0
        receiver.release.set()
        daemon.start()
        await until_settled(application, 1)
    assert receiver.ids("/hold")[event] == 2


async def test_a_drain_that_is_cut_short_releases_the_delivery_uncounted(
    program: Callable[..., Program], receiver: Receiver, database: str
) -> None:
    daemon = await serving(program, database, f"{receiver.url}/hold", DISPATCHER_DELIVERY_DRAIN_S="0.2")
    async with connected(database) as application:
        (event,) = await emit(application, 1)
        await until(lambda: receiver.ids("/hold")[event] == 1, "the request to be out")
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
        assert await application.fetchval("SELECT count(*) FROM dispatcher.attempt") == 0
        receiver.release.set()
        daemon.start()
        await until_settled(application, 1)
    assert [attempt for path, _, attempt in receiver.got if path == "/hold"] == [1, 1], (
        "a shutdown counted as an attempt"
    )


async def test_sighup_opens_a_network_without_a_restart(
    program: Callable[..., Program], receiver: Receiver, database: str, tmp_path: Path
) -> None:
    file = tmp_path / "dispatcher.toml"
    file.write_text('[network]\nallow = []\n[log]\nformat = "json"\n')
    daemon = program()
    for name in ("ALLOW", "ALLOW_HTTP"):
        del daemon.environment[f"DISPATCHER_NETWORK_{name}"]
    daemon.start("--config", str(file))
    await daemon.is_ready()
    with pytest.raises(AssertionError, match="url"):
        await subscribe(database, daemon, {f"{receiver.url}/hook": {}})
    file.write_text('[network]\nallow = ["127.0.0.0/8"]\nallow_http = true\n[database]\npool_size = 3\n')
    daemon.signal(signal.SIGHUP)
    await until(lambda: "reloaded" in daemon.log.read_text(), "the reload")
    assert "database.pool_size" in daemon.log.read_text(), "what needs a restart is named"
    await subscribe(database, daemon, {f"{receiver.url}/hook": {}})
    async with connected(database) as application:
        (event,) = await emit(application, 1)
        await until(lambda: receiver.ids()[event] == 1, "a delivery into the opened network")
    file.write_text("[network]\nallow = 7\n")
    daemon.signal(signal.SIGHUP)
    await until(lambda: "reload.refused" in daemon.log.read_text(), "the refusal")
    assert (await daemon.status())[0] == 200


async def test_the_daemon_survives_a_restart_of_postgresql(
    program: Callable[..., Program], receiver: Receiver, tmp_path: Path
) -> None:
    given = os.environ.get("DISPATCHER_TEST_BIN")
    server = EmbeddedPostgres(tmp_path / "postgres", Path(given) if given else None)
    server.start()
    daemon = None
    try:
        await migrate(server.dsn)
        daemon = await serving(program, server.dsn, f"{receiver.url}/hook", dsn=server.dsn)
        async with connected(server.dsn) as application:
            sent = await emit(application, 300)
            await until(lambda: len(receiver.got) > 20, "the load to be under way")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGQUIT)  # immediate shutdown: a crash, as far as anybody connected can tell
        await daemon.is_unready()
        await asyncio.to_thread(server.start)
        await daemon.is_ready()
        async with connected(server.dsn) as application:
            sent += await emit(application, 30)
            await until(lambda: set(sent) <= set(receiver.ids()), "every committed event")
            await until_settled(application, len(sent))
    finally:
        if daemon is not None:
            daemon.signal(signal.SIGKILL)
            await daemon.ended()
        server.stop()


async def test_without_a_schema_it_exits_2_and_names_the_command(
    program: Callable[..., Program], empty_database: str
) -> None:
    daemon = program(dsn=empty_database)
    daemon.start()
    assert await daemon.ended() == 2
    assert "dispatcher migrate" in daemon.log.read_text()


async def test_without_a_database_it_exits_3_and_waits_when_told_to(
    program: Callable[..., Program], database: str
) -> None:
    nowhere = f"postgresql://nobody@{free_address()}/nothing"
    daemon = program(dsn=nowhere)
    daemon.start()
    assert await daemon.ended() == 3
    assert "cannot connect" in daemon.log.read_text()
    waiting = program(dsn=nowhere)
    waiting.start("--wait")
    await until(lambda: "database.waiting" in waiting.log.read_text(), "it to say that it waits")
    waiting.signal(signal.SIGTERM)
    await waiting.ended()


async def test_a_port_that_is_taken_is_one_line_and_exit_2(program: Callable[..., Program]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        daemon = program(DISPATCHER_SERVER_LISTEN=f"127.0.0.1:{taken.getsockname()[1]}")
        daemon.start()
        assert await daemon.ended() == 2
    assert "[server] listen" in daemon.log.read_text()
    assert "Traceback" not in daemon.log.read_text()


async def test_idle_daemon_has_not_loaded_what_only_people_look_at(program: Callable[..., Program]) -> None:
    daemon = program(PYTHONPROFILEIMPORTTIME="1")
    daemon.start()
    await daemon.is_ready()

    def loaded() -> set[str]:
        return set(re.findall(r"^import time:.*\| +([\w.]+)$", daemon.log.read_text(), re.MULTILINE))

    idle = loaded()
    assert {"dispatcher.web.api", "structlog", "aiohttp.web"} <= idle
    packages = {name.partition(".")[0] for name in idle if "." in name}  # a package that was only looked for has none
    assert not packages & {"rich", "pygments", "jinja2", "opentelemetry", "greenlet"}
    assert "dispatcher.web.dashboard.app" not in idle
    async with aiohttp.ClientSession() as session, session.get(f"http://{daemon.api}/sign-in") as answer:
        assert answer.status == 200
    assert {"jinja2", "dispatcher.web.dashboard.app"} <= loaded()
