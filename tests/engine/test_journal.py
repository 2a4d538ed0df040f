"""The log of deliveries, and the traces that pass through: as a running engine makes them."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from typing import Any

import pytest
from house import IDS, Arrival, House, until

from dispatcher.config import Log
from dispatcher.core.attempt import Attempt
from dispatcher.engine.journal import LINES_PER_S, Journal
from dispatcher.logs import start_logging
from dispatcher.model import Result

KEYS = [
    "timestamp", "level", "event", "logger", "account", "webhook", "delivery", "event_id", "type", "attempt", "result",
    "status", "duration_ms", "error", "next_attempt_at", "trace_id",
]  # fmt: skip
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def of_deliveries(stream: io.StringIO) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [line for line in lines if line["logger"] == "dispatcher.deliveries"]


async def emit(house: House, traceparent: str | None = None, data: str = "{}") -> str:
    return str(
        await house.app.fetchval(
            "INSERT INTO dispatcher.outbox (type, data, traceparent) VALUES ('test.event', $1, $2) RETURNING id",
            data,
            traceparent,
        )
    )


# ── lines ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_failed_attempt_has_one_line_with_all_that_is_known(house: House, log_stream: io.StringIO) -> None:
    start_logging(Log(format="json"), log_stream)
    webhook = await house.webhook(retry="none")
    house.receiver.answer = lambda arrival: 503
    await house.start()
    event = await emit(house, TRACE)
    await until(lambda: house.settled(1))
    [line] = of_deliveries(log_stream)
    assert list(line) == KEYS
    key, seq = await house.key(webhook), await house.app.fetchval("SELECT seq FROM dispatcher.outbox")
    expected = {
        "level": "warning", "event": "delivery.exhausted", "account": "default", "webhook": webhook.id,
        "delivery": IDS.id_of(key, seq, 0), "event_id": event, "type": "test.event", "attempt": 1, "result": "5xx",
        "status": 503, "error": None, "next_attempt_at": None, "trace_id": TRACE[3:35],
    }  # fmt: skip
    assert {name: line[name] for name in expected} == expected
    assert line["duration_ms"] >= 0
    assert house.receiver.arrivals[0].headers["X-Trackpost-Delivery"] == line["delivery"]


async def test_line_of_a_failure_that_is_tried_again_says_when(house: House, log_stream: io.StringIO) -> None:
    start_logging(Log(format="json"), log_stream)
    await house.webhook(retry=[3600.0])
    house.receiver.answer = lambda arrival: 500
    await house.start()
    await emit(house)
    await until(house.pending)
    [line] = of_deliveries(log_stream)
    due = await house.app.fetchval("SELECT due_at FROM dispatcher.pending")
    assert (line["level"], line["event"]) == ("info", "delivery.retrying")
    assert line["next_attempt_at"] == f"{due:%Y-%m-%dT%H:%M:%S.%f}Z"


async def test_event_that_cannot_be_sent_has_a_line_with_the_reason(house: House, log_stream: io.StringIO) -> None:
    start_logging(Log(format="json"), log_stream)
    await house.webhook()
    await house.start()
    event = await emit(house, data="[]")
    await until(lambda: of_deliveries(log_stream))
    [line] = of_deliveries(log_stream)
    assert (line["event"], line["event_id"], line["account"]) == ("event.discarded", event, "default")
    assert "object" in line["reason"]


@pytest.mark.parametrize(("share", "many"), [(0.0, 0), (0.25, 5), (1.0, 20)])
async def test_share_of_the_successes_has_lines(house: House, log_stream: io.StringIO, share: float, many: int) -> None:
    start_logging(Log(format="json"), log_stream)
    await house.webhook()
    await house.start(log_successes=share)
    await house.emit(1, 20)
    await until(lambda: house.settled(20))
    lines = of_deliveries(log_stream)
    assert [line["event"] for line in lines] == ["delivery.delivered"] * many
    assert all(list(line) == KEYS for line in lines)


async def test_journal_is_not_asked_about_successes_that_nobody_wants(house: House) -> None:
    await house.webhook()
    running = await house.start()
    running.engine.deliverer.journal = None  # type: ignore[assignment]  # to ask it would raise
    await house.emit(1, 20)
    await until(lambda: house.settled(20))


async def test_failures_can_be_switched_off(house: House, log_stream: io.StringIO) -> None:
    start_logging(Log(format="json"), log_stream)
    await house.webhook(retry="none")
    house.receiver.answer = lambda arrival: 500
    await house.start(log_failures=False)
    await emit(house)
    await emit(house, data="[]")
    await until(lambda: house.settled(1))
    assert of_deliveries(log_stream) == []


# ── traces ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def traces(arrivals: list[Arrival]) -> list[str | None]:
    return [arrival.headers.get("traceparent") for arrival in arrivals]


async def test_traceparent_is_passed_on_with_every_attempt(house: House) -> None:
    await house.webhook(retry=[0.01])
    house.receiver.answer = lambda arrival: 500 if arrival.attempt == 1 else 200
    await house.start()
    await emit(house, TRACE)
    await until(lambda: house.settled(1))
    assert traces(house.receiver.arrivals) == [TRACE, TRACE]


async def test_traceparent_may_be_set_for_a_transaction(house: House) -> None:
    await house.webhook()
    async with house.app.transaction():
        await house.app.execute("SELECT set_config('dispatcher.traceparent', $1, true)", TRACE)
        await house.emit()
        await house.app.execute("SELECT dispatcher.emit('test.event', '{}')")
    await house.emit()
    await house.start()
    await until(lambda: house.settled(3))
    by_event = {arrival.event_id: arrival.headers.get("traceparent") for arrival in house.receiver.arrivals}
    events = await house.app.fetch("SELECT id FROM dispatcher.outbox ORDER BY seq")
    assert [by_event[row["id"]] for row in events] == [TRACE, TRACE, None]


@pytest.mark.parametrize("given", [None, "", "nonsense", TRACE.upper(), TRACE[:-4] + "\r\nX", "x" * (1 << 20)])
async def test_what_is_no_traceparent_is_neither_refused_nor_sent(house: House, given: str | None) -> None:
    await house.webhook()
    await house.start()
    await emit(house, given)
    await until(lambda: house.settled(1))
    assert traces(house.receiver.arrivals) == [None]


async def test_replay_of_an_event_belongs_to_its_trace(house: House) -> None:
    await house.webhook()
    running = await house.start()
    await emit(house, TRACE)
    await until(lambda: house.settled(1))
    await house.stop(running)
    await house.app.execute(
        "INSERT INTO dispatcher.pending"
        " (endpoint_id, event_seq, generation, event_xid, event_at, state, attempts, due_at)"
        " SELECT e.id, o.seq, 1, o.xid, o.written_at, 'pending', 0, 'infinity'"
        " FROM dispatcher.outbox o, dispatcher.endpoint e"
    )
    await house.start()
    await until(lambda: house.settled(2))
    assert traces(house.receiver.arrivals) == [TRACE, TRACE]


# ── many lines ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_has_a_thousand_lines_and_the_next_one_says_how_many_it_had_besides(log_stream: io.StringIO) -> None:
    start_logging(Log(format="json"), log_stream)
    now = 100.0
    journal = Journal(IDS, clock=lambda: now)
    subscriber = SimpleNamespace(endpoint=SimpleNamespace(id=1, account="default", public_id="wh_1"))
    payload = SimpleNamespace(event_id="evt_1", type="test.event")
    delivery: Any = SimpleNamespace(
        subscriber=subscriber, generation=0, event=SimpleNamespace(seq=1, payload=payload, traceparent=None)
    )
    for _ in range(LINES_PER_S + 7):
        journal.failed(delivery, Attempt(Result.TIMEOUT), "exhausted", 1, None)
    assert len(of_deliveries(log_stream)) == LINES_PER_S
    now += 1.0
    for _ in range(2):
        journal.failed(delivery, Attempt(Result.TIMEOUT), "exhausted", 1, None)
    told, first, second = of_deliveries(log_stream)[LINES_PER_S:]
    assert (told["event"], told["level"], told["lines"]) == ("delivery.unlogged", "warning", 7)
    assert [first["event"], second["event"]] == ["delivery.exhausted"] * 2
