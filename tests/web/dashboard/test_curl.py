"""The copied command, run by a real shell: a local receiver gets the request that was on record, to the byte."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from standardwebhooks import Webhook

from dispatcher.core.signing import new_secret
from dispatcher.web.dashboard.curl import command

BODIES = [
    b'{"id":"evt_1","data":{"to":"user@example.com"}}',
    b"""{"quote":"it's $HOME `id` $(id) \\"\\\\ \\n !! %s %d %%"}""",
    '{"emoji":"\U0001f600","umlaut":"ü","separators":"\u2028\u202e"}'.encode(),
    b"@/etc/passwd",
    b"-n",
    b"",
    b"\n\n",
    bytes(range(256)) * 3 + b"\x001",
    b'{"long":"' + b"x" * 250_000 + b'"}',
]
SHELLS = [shell for shell in ("sh", "dash", "bash") if shutil.which(shell)]


class Receiver:
    def __init__(self) -> None:
        self.url = ""
        self.path = ""
        self.fields: list[tuple[str, str]] = []
        self.body = b""

    async def handle(self, request: web.Request) -> web.Response:
        self.path = request.raw_path
        self.fields = [(name.decode(), value.decode("latin-1")) for name, value in request.raw_headers]
        self.body = await request.read()
        return web.Response(text="thanks")


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    it = Receiver()
    app = web.Application(client_max_size=1 << 20)
    app.router.add_post("/{rest:.*}", it.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    it.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield it
    await runner.cleanup()


@pytest.fixture(autouse=True)
def _tools() -> None:
    if missing := [tool for tool in ("curl", "openssl", "base64", "od") if shutil.which(tool) is None]:
        pytest.skip(f"not on this machine: {', '.join(missing)}")


async def run(text: str, directory: Path, shell: str = "sh", **environment: str) -> tuple[int, str]:
    """As somebody would who saved it: an argument may not be as long as a body."""
    script = directory / "copied.sh"
    script.write_text(text, encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        shell, script, env={"PATH": os.environ["PATH"], **environment}, stdout=-1, stderr=-1
    )
    out, err = await process.communicate()
    return process.returncode or 0, (out + err).decode(errors="replace")


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:12]))
@pytest.mark.parametrize("shell", SHELLS)
async def test_any_body_arrives_to_the_byte(receiver, tmp_path, shell, body):
    code, said = await run(command(f"{receiver.url}/hook", [], body), tmp_path, shell)
    assert code == 0, said
    assert "200 OK" in said
    assert receiver.body == body


async def test_url_and_header_fields_arrive_as_they_were_sent(receiver, tmp_path):
    host = receiver.url.removeprefix("http://")
    sent = [
        ("Host", host),
        ("Content-Type", "application/json"),
        ("User-Agent", "TrackPost-Webhooks/1.0"),
        ("X-Odd", 'it\'s $HOME "x" `id` \\ ;'),
        ("X-Latin", "g\u00fcnstig \u00a7"),
        ("X-Empty", ""),
        ("X-Tab", "a\tb"),
        ("Content-Length", "2"),
    ]
    path = "/a/../b//[1-3]{x,y}?q='%20&r=$HOME"
    code, said = await run(command(receiver.url + path, sent, b"{}"), tmp_path)
    assert code == 0, said
    assert sorted(receiver.fields) == sorted(sent)
    assert receiver.path == path


@pytest.mark.parametrize("secret", [new_secret(os.urandom(24)), "it's $(id) a secret", "whsec-but-not-so"])
async def test_a_signed_request_is_signed_anew(receiver, tmp_path, secret):
    body = BODIES[1]
    sent = [
        ("webhook-id", "evt_1"),
        ("webhook-timestamp", "1"),
        ("webhook-signature", "…"),
        ("X-Trackpost-Signature", "…"),
    ]
    text = command(f"{receiver.url}/hook", sent, body, signature_prefix="X-Trackpost-")
    assert secret not in text
    code, said = await run(text, tmp_path, WEBHOOK_SECRET=secret)
    assert code == 0, said
    got = dict(receiver.fields)
    assert got["X-Trackpost-Signature"] == hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    reader = Webhook(secret) if secret.startswith("whsec_") else Webhook(secret.encode())
    reader.verify(body, got)


async def test_without_the_secret_nothing_is_sent(receiver, tmp_path):
    text = command(f"{receiver.url}/hook", [], b"{}", signature_prefix="X-Trackpost-")
    code, said = await run(text, tmp_path)
    assert code != 0
    assert "WEBHOOK_SECRET: set it to the signing secret" in said
    assert receiver.path == ""


def test_what_cannot_be_made_anew_is_left_out():
    text = command("https://example.com/", [("webhook-signature", "…"), ("webhook-id", "evt_1")], b"{}")
    assert "webhook-signature" not in text
    assert "-H 'webhook-id: evt_1'" in text
