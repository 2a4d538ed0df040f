"""Ten thousand connections that accept and never answer."""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from arena import PATIENCE_S, Growth, open_stage

from dispatcher.model import Result

CONNECTIONS = 10_000
OWN_FILES = 200  # besides one for each connection
EACH = 16  # connections of one webhook
BYTES_EACH_MAX = 16 << 10  # of a plain connection with its request, in this process; measured: 7 KiB


@pytest.fixture
def files() -> Iterator[int]:
    """How many descriptors there may be, raised as far as the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + OWN_FILES
    limit = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
    yield max(soft, limit)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def ports() -> Iterator[list[int]]:
    """Where a process of its own keeps silent."""
    command = [sys.executable, str(Path(__file__).with_name("silent.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as silent:
        assert silent.stdout is not None
        yield list(map(int, silent.stdout.readline().split()))


async def test_ten_thousand_that_never_answer_cost_little_and_delay_nobody(files: int, ports: list[int]) -> None:
    count = min(CONNECTIONS, files - OWN_FILES) // EACH
    async with open_stage(in_flight_max=2 * CONNECTIONS, idle_connections_max=CONNECTIONS) as stage:
        silent = [
            stage.webhook(ports[n % len(ports)], max_concurrency=EACH, timeout_s=PATIENCE_S) for n in range(count)
        ]
        # A window is opened by successes, which these never have: this test is about the connections.
        for webhook in silent:
            stage.deliverer.subscriber(webhook).lane.window.size = EACH
        grown = Growth()
        for _ in range(EACH):
            stage.emit(*silent)
        async with asyncio.timeout(PATIENCE_S):
            while stage.transport.count_connections()["active"] < count * EACH:
                await asyncio.sleep(0.01)
        grown.check(count * EACH * BYTES_EACH_MAX)
        for _ in range(20):
            await stage.serve_healthy()
        await stage.transport.close()  # each of them ends here, as a request that was given up and not as an attempt
        assert not stage.transport.connections
        assert [await stage.log(webhook) for webhook in silent[:10]] == [[]] * 10
        assert not stage.deliverer.in_flight


async def test_a_crowd_that_never_answers_ends_at_its_deadline(ports: list[int]) -> None:
    async with open_stage() as stage:
        silent = [stage.webhook(ports[n % len(ports)], timeout_s=1.0) for n in range(250)]
        for _ in range(4):
            stage.emit(*silent)
        for _ in range(20):
            await stage.serve_healthy()
        async with asyncio.timeout(PATIENCE_S):
            await stage.deliverer.drained(PATIENCE_S)
        for webhook in silent:
            entries = await stage.log(webhook)
            assert {entry.result for entry in entries} == {Result.TIMEOUT}
            assert len(entries) == 4
