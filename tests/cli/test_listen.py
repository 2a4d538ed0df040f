"""`trackpost listen` as its user has it: a process of its own between a real API and a local server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import asyncpg
import pytest
from aiohttp import web
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from shell import PROGRAMS, Shell

from dispatcher.cli.customer import main
from dispatcher.cli.forwarding import Messages
from dispatcher.cli.receiver import Receiver
from dispatcher.core.addresses import Guard
from dispatcher.core.backoff import PRESETS
from dispatcher.core.catalogue import Catalogue
from dispatcher.snapshot import Snapshot
from dispatcher.store.accounts import AccountStore
from dispatcher.store.database import open_pool
from dispatcher.store.endpoints import EndpointDefaults, EndpointStore
from dispatcher.store.events import EventStore
from dispatcher.store.vault import Vault
from dispatcher.web.api import build_api_app
from dispatcher.web.parts import Web
from dispatcher.web.server import serve

PATIENCE_S = 60.0
ODD = '{"2": 1.0, "1": 1e21, "emoji": "\U0001f600\u2028", "deep": [[], {}, {"x": -0.0}]}'


class Api:
    """A served API that can go away and come back where it was."""

    def __init__(self, parts: Web, key: str) -> None:
        self.parts = parts
        self.key = key
        self.address = "127.0.0.1:0"
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        self._runner = await serve(build_api_app(self.parts), self.address)
        self.address = f"127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None


@pytest.fixture
async def api(database: str) -> AsyncIterator[Api]:
    pool = await open_pool(database, size=4)
    accounts = AccountStore(pool)
    parts = Web(
        accounts=accounts,
        endpoints=EndpointStore(pool, Vault(b"k" * 32)),
        events=EventStore(pool),
        guard=Guard(),
        catalogue=Catalogue.builtin(),
        defaults=EndpointDefaults(schedule_s=(60.0,), schedules=PRESETS, max_concurrency=16, timeout_s=30.0),
        snapshot=Snapshot,
    )
    api = Api(parts, (await accounts.create_key("acme"))[1])
    await api.start()
    yield api
    await api.stop()
    await pool.close()


@pytest.fixture
async def app(database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


async def emit(app: asyncpg.Connection, type_: str, data: str = "{}") -> str:
    sql = "INSERT INTO dispatcher.outbox (account, type, data) VALUES ('acme', $1, $2) RETURNING id"
    return str(await app.fetchval(sql, type_, data))


class Listening:
    """The running command, which tells what it does in a line of JSON each."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def next(self, kind: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            while line := await self.process.stdout.readline():
                told: dict[str, Any] = json.loads(line)
                if told["kind"] == kind:
                    return told
        raise AssertionError(f"it ended before {kind}: {await self.errors()}")

    async def errors(self) -> str:
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()

    async def ended(self) -> int:
        async with asyncio.timeout(PATIENCE_S):
            return await self.process.wait()


Start = Callable[..., Coroutine[Any, Any, Listening]]


@pytest.fixture
async def start(api: Api, shell: Shell) -> AsyncIterator[Start]:
    running: list[Listening] = []

    async def launch(*arguments: str, key: str = api.key) -> Listening:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            f"from {PROGRAMS['trackpost']} import main; main(prog_name='trackpost')",
            "listen",
            *arguments,
            env={**shell.environ, "TRACKPOST_API_URL": f"http://{api.address}", "TRACKPOST_API_KEY": key},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        running.append(Listening(process))
        return running[-1]

    yield launch
    for listening in running:
        with contextlib.suppress(ProcessLookupError):
            listening.process.kill()
        await listening.process.communicate()


async def test_events_are_forwarded_as_deliveries_are(api: Api, app: asyncpg.Connection, start: Start) -> None:
    async with Receiver() as local:
        listening = await start("--forward-to", f"{local.url}/express")
        local.secrets["express"] = (await listening.next("connected"))["secret"]
        assert local.secrets["express"].startswith("whsec_")
        event_id = await emit(app, "email.sent", ODD)
        assert (await listening.next("event"))["id"] == event_id
        answer = await listening.next("answer")
        assert (answer["id"], answer["status"], answer["error"]) == (event_id, 200, None)
        landing = await local.landings.get()
        assert landing.verified
        assert (landing.type, landing.event_id, landing.attempt) == ("email.sent", event_id, "1")
        assert landing.delivery_id.startswith("dlv_")
        listening.process.send_signal(signal.SIGINT)
        assert await listening.ended() == 0
        assert await listening.errors() == ""


async def test_the_python_style_and_a_secret_of_ones_own(
    api: Api, app: asyncpg.Connection, start: Start, shell: Shell
) -> None:
    (shell.home / "secret").write_text("whsec_" + "QUJD" * 8 + "\n")
    async with Receiver() as local:
        local.secrets["flask"] = "whsec_" + "QUJD" * 8
        url = f"{local.url.removeprefix('http://')}/flask"
        listening = await start(
            "--forward-to", url, "--body-style", "python", "--secret-file", str(shell.home / "secret")
        )
        assert (await listening.next("connected"))["secret"] == local.secrets["flask"]
        await emit(app, "email.sent", ODD)
        assert (await listening.next("answer"))["status"] == 200
        assert (await local.landings.get()).verified


async def test_what_goes_wrong_locally_is_told_and_goes_on(api: Api, app: asyncpg.Connection, start: Start) -> None:
    async with Receiver() as local:
        listening = await start("--forward-to", f"{local.url}/express", "--events", "email.*")
        local.secrets["express"] = "whsec_" + "QUJD" * 8
        await listening.next("connected")
        await emit(app, "domain.verified")
        await emit(app, "email.sent")
        assert (await listening.next("answer"))["status"] == 401
    await emit(app, "email.bounced")
    answer = await listening.next("answer")
    assert (answer["type"], answer["status"]) == ("email.bounced", None)
    assert answer["error"]


async def test_a_broken_connection_is_told_and_nothing_is_missed(
    api: Api, app: asyncpg.Connection, start: Start
) -> None:
    listening = await start()
    await listening.next("connected")
    await emit(app, "number.one")
    assert (await listening.next("event"))["type"] == "number.one"
    await api.stop()
    assert (await listening.next("lost"))["again_in_s"] >= 0
    await emit(app, "number.two")
    await api.start()
    assert (await listening.next("connected"))["again"] is True
    await emit(app, "number.three")
    assert [(await listening.next("event"))["type"] for _ in range(2)] == ["number.two", "number.three"]


async def test_a_key_that_is_refused_ends_it(start: Start) -> None:
    listening = await start(key="tp_live_" + "x" * 33)
    assert await listening.ended() == 4
    assert "API key" in await listening.errors()


async def test_nobody_there_ends_it_at_the_start(api: Api, start: Start) -> None:
    await api.stop()
    listening = await start()
    assert await listening.ended() == 3
    assert "cannot reach" in await listening.errors()


async def test_a_type_that_does_not_exist_ends_it(start: Start) -> None:
    listening = await start("--events", "emial.sent")
    assert await listening.ended() == 1
    assert "email.sent" in await listening.errors()


@pytest.mark.parametrize("url", ["ftp://localhost/", "http://", "http://localhost:99999/", "://"])
def test_what_is_no_url_is_refused(url: str) -> None:
    result = CliRunner().invoke(main, ["listen", "--forward-to", url], env={"TRACKPOST_API_KEY": "k" * 20})
    assert result.exit_code == 2
    assert "--forward-to" in result.stderr


async def test_people_see_a_line_in_and_a_line_out(api: Api, app: asyncpg.Connection, shell: Shell) -> None:
    ours, theirs = pty.openpty()
    env = {"TRACKPOST_API_URL": f"http://{api.address}", "TRACKPOST_API_KEY": api.key, "TERM": "xterm", "NO_COLOR": "1"}
    shown, reader = "", asyncio.StreamReader()
    terminal, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb", 0)
    )

    async def until(text: str) -> None:
        nonlocal shown
        async with asyncio.timeout(PATIENCE_S):
            while text not in shown:
                shown += (await reader.read(65536)).decode()

    async with Receiver() as local:
        local.secrets["express"] = "whsec_" + "QUJD" * 8
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        with shell.start("trackpost", "listen", "--forward-to", f"{local.url}/express", env=env, **streams) as process:
            await until("Signing secret of this run: whsec_")
            event_id = await emit(app, "email.sent")
            await until(f"--> email.sent  {event_id}")
            await until(f"<-- 401  {event_id}")
            await until("wrong secret")
            process.send_signal(signal.SIGINT)
            await until("1 event, 1 not accepted")
            assert await asyncio.to_thread(process.wait, PATIENCE_S) == 0
    terminal.close()
    os.close(theirs)


@given(st.lists(st.integers(1, 40), max_size=20))
def test_messages_are_the_same_however_the_stream_is_cut(cuts: list[int]) -> None:
    stream = (
        ': hello\nretry: 1000\n\nid: 1\nevent: a.b\ndata: {"x":"ü"}\r\n\r\n: heartbeat\n\ndata:one\ndata: two\n\n'
    ).encode()
    messages, found, rest = Messages(), [], stream
    for cut in cuts:
        found += messages.feed(rest[:cut])
        rest = rest[cut:]
    found += messages.feed(rest)
    assert found == [{"id": "1", "event": "a.b", "data": '{"x":"ü"}'}, {"data": "one\ntwo"}]


def test_a_line_without_an_end_is_refused() -> None:
    messages = Messages()
    for _ in range(4):
        assert list(messages.feed(b"x" * (1 << 20))) == []
    with pytest.raises(ValueError):
        list(messages.feed(b"x"))
