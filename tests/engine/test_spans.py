"""Spans of delivery attempts, as a collector gets them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web
from house import IDS, House, until
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from dispatcher.engine.engine import Engine
from dispatcher.engine.spans import Spans, open_spans
from dispatcher.errors import ConfigurationError

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exported() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def exporting(exported: InMemorySpanExporter) -> Any:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exported))

    def prepare(engine: Engine) -> None:
        engine.deliverer.spans = Spans(provider, IDS)

    return prepare


async def emit(house: House, traceparent: str | None = None) -> str:
    return str(
        await house.app.fetchval(
            "INSERT INTO dispatcher.outbox (type, data, traceparent) VALUES ('test.event', '{}', $1) RETURNING id",
            traceparent,
        )
    )


async def test_attempt_is_a_child_of_what_made_the_event_and_the_parent_of_what_the_subscriber_does(
    house: House, exported: InMemorySpanExporter
) -> None:
    webhook = await house.webhook(retry=[0.01])
    house.receiver.answer = lambda arrival: 503 if arrival.attempt == 1 else 200
    await house.start(exporting(exported))
    event = await emit(house, TRACE)
    await until(lambda: house.settled(1))
    first, second = exported.get_finished_spans()
    for span, arrival in zip((first, second), house.receiver.arrivals, strict=True):
        assert span.context is not None
        assert span.parent is not None
        trace, own = f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"
        assert arrival.headers["traceparent"] == f"00-{trace}-{own}-01"
        assert (trace, f"{span.parent.span_id:016x}") == (TRACE[3:35], TRACE[36:52])
        assert span.attributes is not None
        assert span.attributes["messaging.message.id"] == event
        assert span.attributes["dispatcher.webhook"] == webhook.id
        assert span.attributes["dispatcher.delivery"] == arrival.headers["X-Trackpost-Delivery"]
        assert house.receiver.url not in str(span.attributes)
    assert first.attributes is not None and second.attributes is not None  # noqa: PT018
    assert first.status.status_code is StatusCode.ERROR
    assert (first.attributes["http.response.status_code"], first.attributes["error.type"]) == (503, "503")
    assert second.status.status_code is StatusCode.UNSET
    assert (second.attributes["http.response.status_code"], second.attributes["http.request.resend_count"]) == (200, 1)


async def test_attempt_of_an_event_without_a_trace_begins_one(house: House, exported: InMemorySpanExporter) -> None:
    await house.webhook()
    await house.start(exporting(exported))
    await emit(house, "nonsense")
    await until(lambda: house.settled(1))
    [span] = exported.get_finished_spans()
    assert span.parent is None
    assert span.context is not None
    assert house.receiver.arrivals[0].headers["traceparent"][3:35] == f"{span.context.trace_id:032x}"


async def test_every_span_is_closed_whatever_became_of_its_request(
    house: House, exported: InMemorySpanExporter
) -> None:
    await house.webhook("/a", retry="none")
    await house.webhook("/b", retry="none", url="http://127.0.0.1:1/")
    running = await house.start(exporting(exported))
    for _ in range(4):  # one more, and the webhook that refuses would be set aside
        await emit(house)
    await until(lambda: house.settled(8))
    assert running.engine.deliverer.spans is not None
    assert running.engine.deliverer.spans._open == {}
    kinds = sorted(str((span.attributes or {}).get("error.type")) for span in exported.get_finished_spans())
    assert kinds.count("None") == 4
    assert set(kinds) == {"None", "connect"}


async def test_collector_gets_the_spans_over_otlp(house: House) -> None:
    got: list[ExportTraceServiceRequest] = []

    async def take(request: web.Request) -> web.Response:
        got.append(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response(content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    spans = open_spans(f"http://127.0.0.1:{runner.addresses[0][1]}/", "shop webhooks", IDS)

    def prepare(engine: Engine) -> None:
        engine.deliverer.spans = spans

    await house.webhook()
    running = await house.start(prepare)
    await emit(house, TRACE)
    await until(lambda: house.settled(1))
    await house.stop(running)
    await spans.close()
    await runner.cleanup()
    [resource] = [each for request in got for each in request.resource_spans]
    names = {a.key: a.value.string_value for a in resource.resource.attributes}
    assert names["service.name"] == "shop webhooks"
    [span] = resource.scope_spans[0].spans
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE[3:35], TRACE[36:52])


async def test_collector_that_is_away_costs_no_delivery_and_a_bounded_end(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dispatcher.engine.spans.CLOSE_S", 0.01)
    spans = open_spans("http://127.0.0.1:1", "shop webhooks", IDS)

    def prepare(engine: Engine) -> None:
        engine.deliverer.spans = spans

    await house.webhook()
    await house.start(prepare)
    await house.emit(1, 20)
    await until(lambda: house.settled(20))
    async with asyncio.timeout(5):
        await spans.close()


def test_without_the_extra_the_setting_is_refused_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigurationError, match=r"trackpost-dispatcher\[otel\]"):
        open_spans("http://127.0.0.1:4318", "x", IDS)
