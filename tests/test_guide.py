"""The webhook guide's handlers, run as their authors would: they verify what a real engine really delivers.

They hash what they print after parsing, so each holds only if the body is a fixed point of its language's serialiser.
Express comes from npm, into a cache outside of this tree; without node or npm those tests say so and are skipped.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import sys
from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from house import Receiver
from javascript import express, node
from standardwebhooks import Webhook

from dispatcher.core.addresses import Guard
from dispatcher.core.backoff import PRESETS
from dispatcher.core.ids import DeliveryIds
from dispatcher.engine.engine import Engine, EngineSettings
from dispatcher.engine.transport import Transport, TransportSettings
from dispatcher.model import BodyStyle
from dispatcher.store.database import connect
from dispatcher.store.endpoints import EndpointChange, EndpointDefaults, EndpointStore
from dispatcher.store.vault import Vault

GUIDE = Path(__file__).parent / "guide"
PATIENCE_S = 60.0
SECRET = "your_webhook_secret"

# As an application may write them, to the byte: what a serialiser would do to them is the question.
WRITTEN = [
    "{}",
    '{"email_id": "msg_def456", "to": "user@example.com", "delivered_at": "2025-01-15T10:30:02Z"}',
    '{"zero": 0.0, "minus_zero": -0.0, "minus_int": -0, "whole": 1.0, "trailing": 1.50, "exponent": 1E5}',
    '{"a": 1e21, "b": 1e20, "c": 123456789012345680.0, "d": 1e-6, "e": 1e-7, "f": 1.5e-10}',
    '{"a": 5e-324, "b": 1.7976931348623157e308, "c": 0.1, "d": 0.30000000000000004, "e": 4.35, "f": 1e-400}',
    '{"most": 9007199254740991, "least": -9007199254740991, "big_float": 9007199254740993.0}',
    '{"b": 1, "10": 1, "9": 2, "01": 3, "-1": 4, "1.5": 5, "4294967294": 6, "4294967295": 7, "a": 8, "0": 9}',
    '{"nested": {"2": {"1": {"b": 1, "a": 2, "0": 3}}, "1": [{"3": 1, "2": 1.0}]}}',
    '{"emoji": "\U0001f600 \U0001f468‍\U0001f469‍\U0001f467", "\U0001f600": "key", "escaped": "\\ud83d\\ude00"}',
    '{"separators": "\u2028\u2029", "escaped": "\\u2028\\u2029", "bom": "\ufeff", "nbsp": "\u00a0"}',
    '{"controls": "\\u0000\\u0001\\b\\f\\n\\r\\t\\u001f\\u007f\u0080\u009f", "quote": "\\"\\\\"}',
    '{"slash": "\\/ / <\\/script>"}',
    '{"__proto__": {"x": 1}, "constructor": 1, "toString": null, "toJSON": "no", "length": 3, "": "empty key"}',
    '{"umlaut": "äöüß", "escaped": "\\u00e4", "chinese": "电子邮件", "arabic": "مرحبا", "combining": "e\u0301"}',
    '{ "blanks" :\t[ 1 ,\n2 , { } , [ ] , "" , null , true , false ] }',
    '{"empty": {"object": {}, "list": [], "lists": [[], [[]], {}]}}',
    '{"text": "' + "long and ünlike " * 2000 + '"}',
    '{"deep": ' + '{"d": [' * 30 + "1.0" + "]}" * 30 + "}",
]
SPLITS_STYLES = '{"a": 1.0, "b": "ü"}'
"""Printed differently by the two languages, blanks aside."""


def made_up(dice: random.Random, depth: int = 0) -> Any:
    """Anything that an event may hold."""
    kind = dice.randrange(8 if depth < 4 else 6)
    if kind == 0:
        return dice.choice([None, True, False, "", {}, []])
    if kind == 1:
        return dice.randint(-(2**53) + 1, 2**53 - 1)
    if kind == 2:
        return dice.uniform(-1, 1) * 10.0 ** dice.randint(-320, 300)
    if kind == 3:
        return float(dice.randint(-(10**6), 10**6))
    if kind <= 5:
        return made_up_text(dice)
    if kind == 6:
        return [made_up(dice, depth + 1) for _ in range(dice.randrange(5))]
    return {made_up_key(dice): made_up(dice, depth + 1) for _ in range(dice.randrange(6))}


def made_up_text(dice: random.Random) -> str:
    ranges = [(0, 0x20), (0x20, 0x7F), (0x7F, 0x800), (0x2020, 0x2030), (0xE000, 0xFFFF), (0x1F600, 0x1F650)]
    return "".join(chr(dice.randrange(*dice.choice(ranges))) for _ in range(dice.randrange(12)))


def made_up_key(dice: random.Random) -> str:
    return dice.choice([str(dice.randrange(200)), str(dice.randrange(2**33)), made_up_text(dice)])


@dataclasses.dataclass
class Handler:
    """A handler's process; on standard output it tells its port, then the id of each event it took."""

    name: str
    style: BodyStyle
    process: asyncio.subprocess.Process
    url: str
    took: list[str] = dataclasses.field(default_factory=list)
    _more: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    async def read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.took.append(line.decode().strip())
            self._more.set()

    async def taken(self, many: int) -> list[str]:
        """The first `many` events it took."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.took) < many:
                self._more.clear()
                await self._more.wait()
        return self.took


async def start(name: str, secret: str = SECRET) -> Handler:
    environ = {**os.environ, "WEBHOOK_SECRET": secret}
    if name == "flask":
        pytest.importorskip("flask", reason="Flask is not installed")
        command, style = [sys.executable, str(GUIDE / "flask_app.py")], BodyStyle.PYTHON
    else:
        command, style = [node(), str(GUIDE / f"{name}.js")], BodyStyle.COMPACT
        if name == "express":
            environ["NODE_PATH"] = str(express())
    process = await asyncio.create_subprocess_exec(
        *command, env=environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        port = int(await process.stdout.readline())
    return Handler(name, style, process, f"http://127.0.0.1:{port}/webhooks/trackpost")


class Sender:
    """An application, its webhooks, and an engine."""

    def __init__(self, app: asyncpg.Connection, engine: Engine, vault: Vault) -> None:
        self.app = app
        self.engine = engine
        self._endpoints = EndpointStore(app, vault)

    async def subscribe(self, handler: Handler | Receiver, style: BodyStyle, secret: str = SECRET) -> None:
        account = await self.app.fetchval("SELECT id FROM dispatcher.account WHERE name = 'default'")
        change = EndpointChange(
            url=handler.url, description="", events=["email.*"], headers={}, body_style=style, retry="none",
            max_concurrency=None, rate_limit=None, ordered=False, timeout_s=None,
        )  # fmt: skip
        await self._endpoints.create(account, change, secret)

    async def emit(self, *written: str) -> list[str]:
        sql = "INSERT INTO dispatcher.outbox (type, data) VALUES ('email.delivered', $1) RETURNING id"
        return [await self.app.fetchval(sql, text) for text in written]

    async def statuses(self, many: int) -> list[int]:
        """What the first `many` requests were answered with."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                rows = await self.app.fetch("SELECT status, error FROM dispatcher.attempt")
                if len(rows) >= many:
                    return [row["status"] for row in rows]
                await asyncio.sleep(0.01)


@pytest.fixture
async def sender(database: str) -> AsyncIterator[Sender]:
    guard, vault = Guard(["127.0.0.0/8"], allow_http=True), Vault(b"k" * 32)
    engine = Engine(
        EngineSettings(
            dsn=database,
            listen_dsn=database,
            jitter=0.0,
            drain_s=5.0,
            defaults=EndpointDefaults(schedule_s=(60.0,), schedules=PRESETS, max_concurrency=16, timeout_s=30.0),
        ),
        transport=Transport(settings=TransportSettings(), guard=guard),
        guard=guard,
        vault=vault,
        ids=DeliveryIds(b"1" * 16),
    )
    app = await connect(database, name="application")
    running = asyncio.create_task(engine.run(), name="engine")
    yield Sender(app, engine, vault)
    engine.stop()
    await running
    await app.close()


@pytest.fixture
async def handler(request: pytest.FixtureRequest) -> AsyncIterator[Handler]:
    handler = await start(request.param)
    reading = asyncio.create_task(handler.read())
    yield handler
    handler.process.kill()
    await handler.process.wait()
    await reading


@pytest.mark.parametrize("handler", ["express", "lambda", "security", "flask"], indirect=True)
async def test_the_guides_handler_verifies_whatever_may_be_sent(handler: Handler, sender: Sender) -> None:
    await sender.subscribe(handler, handler.style)
    seed = random.randrange(1 << 32)
    dice = random.Random(seed)
    written = [*WRITTEN, *(json.dumps({made_up_key(dice): made_up(dice) for _ in range(4)}) for _ in range(60))]
    emitted = await sender.emit(*written)
    statuses = await sender.statuses(len(emitted))
    took = await handler.taken(statuses.count(200))
    refused = [text for text, event_id in zip(written, emitted, strict=True) if event_id not in took]
    assert refused == [], f"seed {seed}"
    assert set(statuses) == {200}
    assert sorted(took) == sorted(emitted)


@pytest.mark.parametrize("style", BodyStyle)
@pytest.mark.parametrize("secret", [SECRET, "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "\U0001f600 ünlike base64"])
async def test_the_standard_webhooks_library_verifies_whatever_may_be_sent(
    sender: Sender, style: BodyStyle, secret: str
) -> None:
    receiver = Receiver()
    await receiver.start()
    try:
        await sender.subscribe(receiver, style, secret)
        seed = random.randrange(1 << 32)
        dice = random.Random(seed)
        written = [*WRITTEN, *(json.dumps({made_up_key(dice): made_up(dice) for _ in range(4)}) for _ in range(60))]
        emitted = await sender.emit(*written)
        await sender.statuses(len(emitted))
    finally:
        await receiver.stop()
    library = Webhook(secret if secret.startswith("whsec_") else b64encode(secret.encode()).decode())
    events = {arrival.event_id: library.verify(arrival.body, arrival.headers) for arrival in receiver.arrivals}
    assert sorted(events) == sorted(emitted), f"seed {seed}"
    for event_id, event in events.items():
        assert (event["id"], event["type"], event["version"]) == (event_id, "email.delivered", "1.0")


@pytest.mark.parametrize("handler", ["express", "lambda", "flask"], indirect=True)
async def test_no_body_is_right_for_both_languages(handler: Handler, sender: Sender) -> None:
    """Why the style is a setting; and that the handlers look at all."""
    other = BodyStyle.PYTHON if handler.style is BodyStyle.COMPACT else BodyStyle.COMPACT
    await sender.subscribe(handler, other)
    await sender.emit("{}", SPLITS_STYLES)
    assert await sender.statuses(2) == [401, 401]
    assert handler.took == []


@pytest.mark.parametrize("handler", ["express", "lambda", "flask"], indirect=True)
async def test_a_wrong_secret_is_refused_as_the_guide_says(handler: Handler, sender: Sender) -> None:
    await sender.subscribe(handler, handler.style, "another secret")
    await sender.emit("{}")
    assert await sender.statuses(1) == [401]
