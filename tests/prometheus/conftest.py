"""A daemon under a little of every kind of load, and what it says to a scraper."""

from __future__ import annotations

import asyncio
import http.server
import os
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from daemon_under_load import DISPATCHER, Running, Subscriber, answers, emit, free_port, key, subscribe, until


@pytest.fixture(scope="session")
def running(administrator: Any, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    name = administrator.create(template)
    dsn = administrator.dsn_of(name)
    api, metrics = (f"127.0.0.1:{free_port()}" for _ in range(2))
    state = tmp_path_factory.mktemp("state")
    environment = {
        **os.environ,
        "DISPATCHER_DATABASE_DSN": dsn,
        "DISPATCHER_STATE_DIRECTORY": str(state),
        "DISPATCHER_SERVER_LISTEN": api,
        "DISPATCHER_METRICS_LISTEN": metrics,
        "DISPATCHER_NETWORK_ALLOW": "127.0.0.0/8",
        "DISPATCHER_NETWORK_ALLOW_HTTP": "true",
        "DISPATCHER_RETRY_SCHEDULE": "1s",
    }
    daemon = subprocess.Popen([*DISPATCHER, "run"], env=environment, stderr=subprocess.DEVNULL)
    subscriber = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Subscriber)
    threading.Thread(target=subscriber.serve_forever, daemon=True).start()
    done = threading.Event()
    emitting = threading.Thread(target=lambda: asyncio.run(emit(dsn, done)))
    try:
        it = Running(metrics)
        until(lambda: answers(f"http://{metrics}/readyz", daemon), "the daemon to be ready")
        api_key = key(environment)
        for status in (200, 500, 404):
            subscribe(api, api_key, f"http://127.0.0.1:{subscriber.server_port}/{status}")
        emitting.start()
        until(lambda: 'dispatcher_deliveries_total{state="exhausted"} 0' not in it.scrape(), "an exhausted delivery")
        until(lambda: "dispatcher_partitions_until_timestamp_seconds{" in it.scrape(), "the upkeep's first round")
        yield it
    finally:
        done.set()
        if emitting.is_alive():
            emitting.join()
        daemon.kill()
        daemon.wait()
        subscriber.shutdown()
        subscriber.server_close()
        administrator.drop(name)


@pytest.fixture(scope="session")
def exposition(running: Running) -> str:
    """What the daemon said to one scrape."""
    return running.scrape()
