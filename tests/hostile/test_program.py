"""The whole program among hostile peers; what it gives away of its secrets; and the replacement of their key."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from arena import PATIENCE_S, Host, answer_well, read_request, resident_bytes, say_nothing
from program import Program
from responses import LIES
from test_peers import tell

from dispatcher.core.signing import Signer
from dispatcher.model import Result
from dispatcher.store.vault import new_key

Make = Callable[..., Program]
Open = Callable[..., Awaitable[Host]]

AMONG = (
    "headers without end", "a body without end", "interim responses without end", "a bomb of gzip", "noise",
    "HTTP/2: a SETTINGS frame", "length long, closes", "chunk beyond 64 bits", "nothing at all", "the end at once",
    "NUL and bytes that are no UTF-8 in the body", "a redirect to the metadata service",
)  # fmt: skip
EVENTS = 15
GROWTH_BYTES_MAX = 96 << 20


@pytest.fixture
def make(tmp_path: Path, database: str) -> Iterator[Make]:
    made: list[Program] = []

    def one(**settings: str) -> Program:
        made.append(Program(tmp_path, settings.pop("dsn", database), **settings))
        return made[-1]

    yield one
    for program in made:
        program.kill()


@pytest.fixture
async def listen() -> AsyncIterator[Open]:
    hosts: list[Host] = []

    async def one(script: Any) -> Host:
        host = Host(script)
        await host.start()
        hosts.append(host)
        return host

    yield one
    for host in hosts:
        await host.stop()


async def subscribe(program: Program, host: Host, **settings: Any) -> str:
    body = {"url": f"http://127.0.0.1:{host.port}/hook", "events": ["email.*"], **settings}
    status, text = await program.ask("POST", "/v1/webhooks", body)
    assert status == 201, text
    return str(json.loads(text)["id"])


async def emit(program: Program, count: int = 1) -> None:
    connection = await asyncpg.connect(program.environ["DISPATCHER_DATABASE_DSN"])
    try:
        await connection.execute(
            "INSERT INTO dispatcher.outbox (type, data) SELECT 'email.sent', json_build_object('n', n)"
            " FROM generate_series(1, $1::integer) n",
            count,
        )
    finally:
        await connection.close()


async def settled(program: Program, webhook: str, count: int) -> list[dict[str, Any]]:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            _, text = await program.ask("GET", f"/v1/webhooks/{webhook}/deliveries?limit=100")
            found: list[dict[str, Any]] = json.loads(text)["data"]
            if sum(each["status"] in ("delivered", "exhausted", "discarded") for each in found) >= count:
                return found
            await asyncio.sleep(0.05)


async def test_the_daemon_serves_the_healthy_among_a_dozen_hostile_peers(make: Make, listen: Open) -> None:
    program = make()
    program.start()
    await program.is_ready()
    assert program.process is not None
    healthy = await subscribe(program, await listen(answer_well))
    lies = {lie.name: lie for lie in LIES if lie.name in AMONG}
    assert lies.keys() == set(AMONG)
    hostile = {}
    for name, lie in lies.items():
        patience_s = 1 if lie.result is Result.TIMEOUT else 30
        hostile[name] = await subscribe(program, await listen(functools.partial(tell, lie)), timeout_s=patience_s)
    before = resident_bytes(program.process.pid)
    await emit(program, EVENTS)
    delivered = await settled(program, healthy, EVENTS)
    assert Counter(each["status"] for each in delivered) == {"delivered": EVENTS}
    for name, webhook in hostile.items():
        found = await settled(program, webhook, 1)
        done = next(each for each in found if each["status"] != "pending" and each["status"] != "in_flight")
        status, text = await program.ask("GET", f"/v1/deliveries/{done['id']}")
        attempt = json.loads(text)["attempts"][0]
        assert (status, attempt["result"]) == (200, lies[name].result.value), name
    assert resident_bytes(program.process.pid) - before < GROWTH_BYTES_MAX
    status, text = await program.page("/metrics")
    assert status == 200
    assert f'dispatcher_attempts_total{{result="{Result.PROTOCOL.value}"}}' in text
    assert (await program.page("/readyz"))[0] == 200
    assert await program.end() == 0
    assert "Traceback" not in program.log.read_text()


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def marked(number: int) -> str:
    """A secret that nothing else in the world looks like."""
    return "whsec_" + base64.b64encode(b"MARKED-%d-MARKED-%d-MARKED" % (number, number)).decode()


async def test_nothing_gives_a_secret_away(make: Make, listen: Open, database: str) -> None:
    """A busy life at the most talkative level, full of mistakes, and then a search through all that was said."""
    password = "MARKED-password"
    dsn = (
        database.replace("://", f"://{_user(database)}:{password}@", 1)
        if "@" not in database
        else database.replace("@", f":{password}@", 1)
    )
    program = make(
        dsn=dsn,
        DISPATCHER_LOG_LEVEL="debug",
        DISPATCHER_DATABASE_LISTEN_DSN=dsn,
    )
    said: list[str] = []
    sent: list[bytes] = []

    async def unauthorised(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            sent.append(await read_request(reader))
            writer.write(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()

    async def ask(method: str, path: str, body: Any = None, **more: Any) -> str:
        said.append((await program.ask(method, path, body, **more))[1])
        return said[-1]

    program.start()
    await program.is_ready()
    host, hanging = await listen(unauthorised), await listen(say_nothing)
    webhook = await subscribe(program, host, secret=marked(1), headers={"Authorization": "Bearer MARKED-header"})
    await subscribe(program, hanging, secret=marked(2), timeout_s=1)
    for body in (
        {"secret": marked(3) + "\x00"},
        {"secret": [marked(3)]},
        {"secret": {"x": marked(3)}},
        {"secret": marked(3) * 10},
        {"secrets": marked(3)},
        {"secret": marked(3), "retry": "no such", "headers": {"Host": marked(3)}},
        {"url": f"https://user:{marked(3)}@example.com/"},
        {"headers": {"X-A\n": marked(3)}},
    ):
        await ask("POST", "/v1/webhooks", {"url": f"http://127.0.0.1:{host.port}/", "events": ["*"], **body})
        await ask("PATCH", f"/v1/webhooks/{webhook}", body)
        await ask("POST", f"/v1/webhooks/{webhook}/rotate-secret", body)
    await program.ask("POST", f"/v1/webhooks/{webhook}/rotate-secret", {"secret": marked(4)})
    await ask("PATCH", f"/v1/webhooks/{webhook}", {"description": "mine"})
    await program.ask("POST", f"/v1/webhooks/{webhook}/test", {})
    await ask("GET", "/v1/webhooks", key="tp_live_MARKED" + "k" * 30)
    await emit(program, 3)
    deliveries = await settled(program, webhook, 3)
    assert program.process is not None
    os.kill(program.process.pid, signal.SIGHUP)
    connection = await asyncpg.connect(database)
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'dispatcher%'"
    )
    await connection.close()
    await program.is_ready()
    for path in (
        "/v1/webhooks", f"/v1/webhooks/{webhook}", f"/v1/webhooks/{webhook}/stats", "/v1/events", "/v1/event-types",
        f"/v1/webhooks/{webhook}/deliveries", f"/v1/deliveries/{deliveries[0]['id']}", "/v1/openapi.json", "/docs",
    ):  # fmt: skip
        await ask("GET", path)
    said += [(await program.page(path))[1] for path in ("/metrics", "/healthz", "/readyz", "/nowhere")]
    for arguments in (["keys", "list"], ["check-config"], ["status"], ["keys", "rotate-master"]):
        said.append((await program.command(*arguments))[1])
    assert await program.end() == 0

    log = program.log.read_text()
    assert "debug" in log, "the level was not the most talkative"
    key_file = (program.log.parent / "secrets.key").read_text().strip()
    signatures = [line.rpartition(": ")[2] for request in sent for line in request.decode().split("\r\n")
                  if "signature" in line.lower()]  # fmt: skip
    assert len(signatures) >= 2 * 3
    everywhere = {
        "a webhook's secret": [marked(1), marked(2), marked(4), base64.b64decode(marked(1)[6:]).decode()],
        "the API key": [program.key, program.key[8:]],
        "the database's password": [password],
        "the key of the secrets": [key_file],
        "a signature": [each.removeprefix("v1,") for each in signatures],
    }
    for what, texts in everywhere.items():
        for text in texts:
            assert text not in log, f"{what} is in the log"
            assert not [answer for answer in said if text in answer], f"{what} was told"
    only_logs = {"what a refused call said": marked(3), "a wrong key": "tp_live_MARKED", "a header": "MARKED-header"}
    for what, text in only_logs.items():
        assert text not in log, f"{what} is in the log"
    assert not [answer for answer in said if marked(3) in answer], "a mistaken secret was repeated"


def _user(dsn: str) -> str:
    return dsn.partition("user=")[2].partition("&")[0] or "postgres"


# ── the key of the secrets ───────────────────────────────────────────────────────────────────────────────────────────


async def test_the_key_of_the_secrets_can_be_replaced(make: Make, listen: Open, tmp_path: Path) -> None:
    """From outside, as the configuration file says it is done: the same secret signs before, while and after."""
    verified = 0
    secret = marked(7)

    async def verify(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal verified
        while True:
            head, _, body = (await read_request(reader)).partition(b"\r\n\r\n")
            fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
            verified += bool(Signer(secret).verify_legacy(body, fields["X-Trackpost-Signature"]))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()

    old, new = tmp_path / "secrets.key", tmp_path / "new.key"
    host = await listen(verify)
    program = make()
    program.start()
    await program.is_ready()
    assert old.stat().st_mode & 0o077 == 0, "the key that was made can be read by others"
    webhook = await subscribe(program, host, secret=secret)
    await emit(program)
    await settled(program, webhook, 1)
    assert await program.end() == 0

    new.write_text(new_key().hex())
    program.environ["DISPATCHER_SECRETS_KEY_FILE"] = str(new)
    program.start()
    assert await program.ended() == 2  # the new key alone is not the database's
    assert "fingerprint" in program.log.read_text()

    program.environ["DISPATCHER_SECRETS_OTHER_KEY_FILES"] = str(old)
    program.start()
    await program.is_ready()
    assert "rotate-master" in program.log.read_text()
    assert await program.command("keys", "rotate-master", "--json") == (0, '{"resealed":1}\n')
    assert await program.command("keys", "rotate-master", "--json") == (0, '{"resealed":0}\n')
    await emit(program)
    await settled(program, webhook, 2)
    assert await program.end() == 0

    old.unlink()
    del program.environ["DISPATCHER_SECRETS_OTHER_KEY_FILES"]
    program.start()
    await program.is_ready()
    await emit(program)
    await settled(program, webhook, 3)
    assert await program.end() == 0
    assert verified == 3
