from __future__ import annotations

import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from dispatcher import __version__
from dispatcher.errors import ConfigurationError
from dispatcher.model import Result
from dispatcher.snapshot import LONG_SECONDS, Snapshot, TableSize
from dispatcher.telemetry import Histogram
from dispatcher.web.metrics import build_metrics_app
from dispatcher.web.server import serve

COUNTERS = {"events", "deliveries", "attempts", "database_losses", "log_lines_dropped"}
HISTOGRAMS = {"attempt_duration_seconds", "delivery_latency_seconds", "settle_batch_size", "database_seconds"}
GAUGES = {
    "outbox_lag_seconds", "outbox_backlog", "in_flight", "retries_waiting", "oldest_pending_seconds", "endpoints",
    "lanes", "connections", "event_loop_lag_seconds", "build_info", "active", "progress_age_seconds", "database_up",
    "instances", "partitions_until_timestamp_seconds", "state_filesystem_size_bytes", "state_filesystem_avail_bytes",
    "shards", "table_bytes", "table_rows", "table_partitions", "default_partition_rows",
    "retention_last_run_timestamp_seconds",
}  # fmt: skip


def busy() -> Snapshot:
    latency = Histogram(LONG_SECONDS)
    for value in (0.0004, 0.0004, 0.002, 1e6):
        latency.observe(value)
    polls = Histogram((0.1, 1.0))
    polls.observe(0.5)
    return Snapshot(
        role="active",
        database=True,
        progress_age_s=0.5,
        events=7,
        deliveries={"delivered": 5, "retrying": 2},
        attempts={"2xx": 5, "timeout": 2},
        delivery_latency=latency.data(),
        database_operations={"poll": polls.data()},
        outbox_lag_s=1.5,
        outbox_backlog=3,
        in_flight=4,
        retries_waiting=2,
        oldest_pending_s=60.0,
        endpoints={"active": 2, "paused": 1, "disabled": 0},
        lanes={"ready": 3, "dead": 1, "probing": 0},
        connections={"idle": 2, "busy": 4},
        event_loop_lag_s=0.001,
        database_losses=3,
        instances={"active": 1},
        partitions_until_unix_s={"outbox": 1.8e9},
        tables=[TableSize("outbox", 4096, 12, 8), TableSize("pending", 1024, 3, 0)],
        astray_rows={"outbox": 5},
        retention_unix_s=1.9e9,
    )


class Scraped:
    """Samples by name and labels."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = {
            (sample.name.removeprefix("dispatcher_"), *sorted(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self.samples[name, *sorted(labels.items())]


class Listener:
    def __init__(self, client: TestClient[Any, Any]) -> None:
        self.client = client
        self.snapshot = busy()

    async def get(self, path: str, **headers: str) -> tuple[int, str, str]:
        async with self.client.get(path, headers=headers) as response:
            return response.status, response.headers["Content-Type"], await response.text()

    async def scrape(self) -> Scraped:
        status, content_type, text = await self.get("/metrics")
        assert (status, content_type.split(";")[0]) == (200, "text/plain")
        return Scraped(text)


@pytest.fixture
async def listener(tmp_path: Path) -> AsyncIterator[Listener]:
    here: list[Listener] = []
    app = build_metrics_app(lambda: here[0].snapshot, state_directory=tmp_path, progress_age_s_max=10.0)
    async with TestClient(TestServer(app)) as client:
        here.append(Listener(client))
        yield here[0]


async def test_the_families_are_these_and_no_others(listener: Listener) -> None:
    families = (await listener.scrape()).families
    ours = {name.removeprefix("dispatcher_"): f.type for name, f in families.items() if name.startswith("dispatcher_")}
    expected = (
        dict.fromkeys(COUNTERS, "counter") | dict.fromkeys(HISTOGRAMS, "histogram") | dict.fromkeys(GAUGES, "gauge")
    )
    assert ours == expected
    assert all(family.documentation for family in families.values())
    assert "process_resident_memory_bytes" in families


async def test_numbers_are_those_of_the_snapshot(listener: Listener) -> None:
    value = await listener.scrape()
    assert value("events_total") == 7
    assert value("deliveries_total", state="delivered") == 5
    assert value("attempts_total", result="timeout") == 2
    assert value("outbox_lag_seconds") == 1.5
    assert value("outbox_backlog") == 3
    assert value("in_flight") == 4
    assert value("retries_waiting") == 2
    assert value("oldest_pending_seconds") == 60
    assert value("endpoints", status="paused") == 1
    assert value("lanes", state="dead") == 1
    assert value("connections", state="idle") == 2
    assert value("event_loop_lag_seconds") == 0.001
    assert value("active") == value("database_up") == 1
    assert value("progress_age_seconds") == 0.5
    assert value("database_losses_total") == 3
    assert (value("instances", role="active"), value("instances", role="standby")) == (1, 0)
    assert value("partitions_until_timestamp_seconds", table="outbox") == 1.8e9


async def test_a_standby_has_no_opinion_on_what_only_the_active_daemon_looks_at(listener: Listener) -> None:
    listener.snapshot = Snapshot(role="standby", database=True)
    value = await listener.scrape()
    assert value("active") == 0
    names = {key[0] for key in value.samples}
    assert not names & {"instances", "partitions_until_timestamp_seconds"}


async def test_the_disk_is_measured_while_it_is_there(listener: Listener, tmp_path: Path) -> None:
    value = await listener.scrape()
    assert value("state_filesystem_size_bytes") == shutil.disk_usage(tmp_path).total
    assert 0 < value("state_filesystem_avail_bytes") < value("state_filesystem_size_bytes")
    tmp_path.rmdir()
    assert not [key for key in (await listener.scrape()).samples if "filesystem" in key[0]]


async def test_tables_are_those_that_retention_saw(listener: Listener) -> None:
    value = await listener.scrape()
    assert (value("table_bytes", table="outbox"), value("table_bytes", table="pending")) == (4096, 1024)
    assert value("table_rows", table="pending") == 3
    assert value("table_partitions", table="outbox") == 8
    assert value("default_partition_rows", table="outbox") == 5
    assert value("retention_last_run_timestamp_seconds") == 1.9e9
    assert ("table_partitions", ("table", "pending")) not in value.samples


async def test_daemon_that_has_not_run_retention_says_nothing_of_tables(listener: Listener) -> None:
    listener.snapshot = Snapshot()
    assert not [name for name, *_ in (await listener.scrape()).samples if "table" in name or "partition" in name]


async def test_histograms_are_cumulated(listener: Listener) -> None:
    value = await listener.scrape()
    assert value("delivery_latency_seconds_bucket", le="0.0005") == 2
    assert value("delivery_latency_seconds_bucket", le="0.001") == 2
    assert value("delivery_latency_seconds_bucket", le="0.0025") == 3
    assert value("delivery_latency_seconds_bucket", le="86400.0") == 3
    assert value("delivery_latency_seconds_bucket", le="+Inf") == value("delivery_latency_seconds_count") == 4
    assert value("delivery_latency_seconds_sum") == pytest.approx(1_000_000.0028)
    assert value("database_seconds_bucket", operation="poll", le="1.0") == 1
    assert value("database_seconds_count", operation="flush") == 0


async def test_labels_known_beforehand_are_there_before_anything_happened(listener: Listener) -> None:
    listener.snapshot = Snapshot()
    value = await listener.scrape()
    assert [value("attempts_total", result=result.value) for result in Result] == [0] * len(Result)
    for state in ("retrying", "delivered", "exhausted", "discarded"):
        assert value("deliveries_total", state=state) == 0
    for status in ("active", "paused", "disabled"):
        assert value("endpoints", status=status) == 0
    assert value("attempt_duration_seconds_count") == 0


async def test_the_build_is_named(listener: Listener) -> None:
    value = await listener.scrape()
    [labels] = [dict(key[1:]) for key in value.samples if key[0] == "build_info"]
    assert labels["version"] == __version__


async def test_who_asks_for_openmetrics_gets_it(listener: Listener) -> None:
    accept = "application/openmetrics-text;version=1.0.0"
    status, content_type, text = await listener.get("/metrics", Accept=accept)
    assert (status, content_type.split(";")[0]) == (200, "application/openmetrics-text")
    assert "dispatcher_events" in {family.name for family in parse_openmetrics(text)}


async def test_healthz_answers_whatever_the_engine_does(listener: Listener) -> None:
    listener.snapshot = Snapshot(database=False, progress_age_s=1e6)
    assert await listener.get("/healthz") == (200, "application/json", '{"status":"alive"}')


@pytest.mark.parametrize("role", ["active", "standby"])
async def test_readyz_is_ready_in_either_role(listener: Listener, role: str) -> None:
    listener.snapshot = Snapshot(role=role, database=True)
    status, _, text = await listener.get("/readyz")
    assert (status, text) == (200, f'{{"status":"ready","role":"{role}"}}')


@pytest.mark.parametrize(
    ("snapshot", "reason"),
    [
        (Snapshot(database=False), "the database cannot be reached"),
        (Snapshot(database=True, progress_age_s=10.6), "the engine has made no progress for 11 s"),
    ],
)
async def test_readyz_says_why_not(listener: Listener, snapshot: Snapshot, reason: str) -> None:
    listener.snapshot = snapshot
    status, content_type, text = await listener.get("/readyz")
    assert (status, content_type) == (503, "application/json")
    assert reason in text


async def test_the_metrics_listener_has_nothing_else(listener: Listener) -> None:
    status, content_type, _ = await listener.get("/v1/webhooks")
    assert (status, content_type) == (404, "application/problem+json")


async def test_serve_answers_and_ends() -> None:
    runner = await serve(build_metrics_app(busy), "127.0.0.1:0", key="[metrics] listen")
    host, port = runner.addresses[0]
    async with aiohttp.ClientSession() as client, client.get(f"http://{host}:{port}/healthz") as response:
        assert response.status == 200
    await runner.cleanup()
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind((host, port))


async def test_a_taken_port_is_named_with_its_key() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigurationError) as caught:
            await serve(web.Application(), listen)
    assert caught.value.problems == [f'[server] listen = "{listen}": cannot listen there: address already in use']


@pytest.mark.parametrize("listen", ["nowhere", "127.0.0.1", "192.0.2.1:80"])
async def test_an_address_nobody_can_listen_on_is_named(listen: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await serve(web.Application(), listen, key="[metrics] listen")
    [problem] = caught.value.problems
    assert problem.startswith(f'[metrics] listen = "{listen}": cannot listen there: ')
