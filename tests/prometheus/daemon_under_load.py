"""What it takes to have a daemon with a little of every kind of load, and to look at it as a scraper does."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest

PATIENCE_S = 60.0
DISPATCHER = [sys.executable, "-c", "from dispatcher.cli.operator import main; main()"]


class Subscriber(http.server.BaseHTTPRequestHandler):
    """Answers with the status that its path names."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(int(self.path.strip("/")))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Running:
    """The daemon's metrics listener."""

    metrics: str

    def scrape(self) -> str:
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as answer:
            return str(answer.read().decode())


def until(condition: Callable[[], Any], what: str) -> Any:
    give_up_at = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        if time.monotonic() > give_up_at:
            pytest.fail(f"waited {PATIENCE_S} s for {what}")
        time.sleep(0.05)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str, daemon: subprocess.Popen[bytes]) -> bool:
    assert daemon.poll() is None, "the daemon ended"
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def key(environment: dict[str, str]) -> str:
    command = [*DISPATCHER, "keys", "create", "--account", "default", "--json"]
    return str(json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)["key"])


def subscribe(api: str, key: str, url: str) -> None:
    request = urllib.request.Request(
        f"http://{api}/v1/webhooks",
        json.dumps({"url": url, "events": ["*"]}).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 201


async def emit(dsn: str, done: threading.Event) -> None:
    connection = await asyncpg.connect(dsn)
    while not done.wait(0.05):
        await connection.execute("INSERT INTO dispatcher.outbox (type, data) VALUES ('email.delivered', '{}')")
    await connection.close()
