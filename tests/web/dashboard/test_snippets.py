"""Every handler that the dashboard offers, run as it is offered: it takes what is genuine, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import pytest
from javascript import express, node

from dispatcher.core.catalogue import Catalogue, EventType
from dispatcher.core.rendering import Payload
from dispatcher.model import BodyStyle
from dispatcher.web.dashboard.snippets import Snippet, snippets

PATIENCE_S = 60.0
SECRET = "it's a secret ü"
HEADER = "X-Trackpost-Signature"
BUILTIN = Catalogue.builtin()
ODD = EventType(
    name="odd.names",
    description="",
    sample={"*/ process.exit(1) //": 1, "class": 2, "a'b": 3, "\u2028": 4, **dict.fromkeys("efghijklmn", 5)},
)
# A Lambda's caller, in front of the handler: what API Gateway hands over, with the body as text or in base64.
LAMBDA = """
require('http').createServer((req, res) => {
  const chunks = [];
  req.on('data', (chunk) => chunks.push(chunk));
  req.on('end', async () => {
    const isBase64Encoded = req.headers['x-base64'] === 'yes';
    const body = Buffer.concat(chunks).toString(isBase64Encoded ? 'base64' : 'utf8');
    const headers = { [req.headers['x-spelling'] ?? 'none']: req.headers['x-trackpost-signature'] };
    const answer = await exports.handler({ body, isBase64Encoded, headers: { ...req.headers, ...headers } });
    res.writeHead(answer.statusCode).end(answer.body);
  });
}).listen(process.env.PORT);
"""


class Handler:
    """A handler's process."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}/webhooks"

    async def post(self, body: bytes, signature: str | None, **headers: str) -> int:
        given = {"Content-Type": "application/json", **headers}
        if signature is not None:
            given[HEADER] = signature
        async with aiohttp.ClientSession() as session, session.post(self.url, data=body, headers=given) as answer:
            return answer.status

    async def up(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                assert self.process.returncode is None, "the handler runs"
                try:
                    await self.post(b"{}", None)
                except aiohttp.ClientConnectorError:
                    await asyncio.sleep(0.02)
                else:
                    return


def signed(body: bytes) -> str:
    return hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()


async def start(snippet: Snippet, directory: Path) -> Handler:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = {**os.environ, "WEBHOOK_SECRET": SECRET, "PORT": str(port)}
    code, program = snippet.code, sys.executable
    if snippet.language == "JavaScript":
        program = node()
        environ["NODE_PATH"] = str(express()) if snippet.key == "express" else ""
        code += LAMBDA if snippet.key == "lambda" else ""
    script = directory / f"handler.{'js' if snippet.language == 'JavaScript' else 'py'}"
    script.write_text(code, encoding="utf-8")
    out = (directory / "out").open("wb")
    process = await asyncio.create_subprocess_exec(program, str(script), env=environ, stdout=out, stderr=out)
    out.close()
    return Handler(process, port)


@pytest.fixture(params=[(style, key) for style in BodyStyle for key in ("express", "flask", "lambda", "raw")])
async def offered(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Handler, BodyStyle]]:
    style, key = request.param
    [snippet] = [one for one in snippets(BUILTIN.get("email.bounced"), style, "X-Trackpost-") if one.key == key]
    handler = await start(snippet, tmp_path)
    try:
        await handler.up()
        yield handler, style
    finally:
        with contextlib.suppress(ProcessLookupError):
            handler.process.kill()
        await handler.process.wait()


async def test_a_handler_takes_what_is_genuine_and_nothing_else(offered: tuple[Handler, BodyStyle]):
    handler, style = offered
    for data in ('{"reason": "ü \\u2028 \\ud83d\\ude00", "n": 1.0}', "{}"):
        body = Payload("evt_1", "email.bounced", datetime(2025, 1, 15, tzinfo=UTC), data).body(style)
        right = signed(body)
        assert await handler.post(body, right) == 200
        assert await handler.post(body, right, **{"X-Base64": "yes", "X-Spelling": HEADER}) == 200
        for wrong in (
            None,
            "",
            right[:-2],
            right + "00",
            right[:-1] + "g",
            f"sha256={right}",
            signed(b"{}!"),
            "ü" * 32,
        ):
            assert await handler.post(body, wrong) == 401, wrong
        changed = json.dumps({**json.loads(body), "id": "evt_2"}).encode()
        assert await handler.post(changed, right) == 401
    assert handler.process.returncode is None


@pytest.mark.parametrize("kind", [*BUILTIN, ODD], ids=lambda kind: kind.name)
@pytest.mark.parametrize("style", BodyStyle)
async def test_each_type_has_handlers_without_mistakes(kind: EventType, style: BodyStyle, tmp_path: Path):
    found = snippets(kind, style, "X-Acme-")
    assert [one.key for one in found] == ["express", "flask", "lambda", "raw"]
    for one in found:
        assert kind.name in one.code
        assert "acme-signature" in one.code.lower()
        assert "@" not in one.code.replace("@app", "")
        if one.language == "Python":
            compile(one.code, one.key, "exec")
            continue
        script = tmp_path / f"{one.key}.js"
        script.write_text(one.code, encoding="utf-8")
        process = await asyncio.create_subprocess_exec(node(), "--check", str(script), stderr=asyncio.subprocess.PIPE)
        _, said = await process.communicate()
        assert process.returncode == 0, said.decode()


def test_odd_names_of_fields_stay_out_of_the_code():
    for one in snippets(ODD, BodyStyle.COMPACT, "X-Trackpost-"):
        assert "process.exit" not in one.code
        assert "class, e, f" in one.code
