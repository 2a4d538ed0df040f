"""What became of each event: listed, looked at, and delivered once more."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
from counter import Desk, open_desk
from house import until

from dispatcher.core.head import WITHHELD
from dispatcher.web.chronicle import as_object, headers_of, readable

if TYPE_CHECKING:
    from tests.web.conftest import Api

NOWHERE = "dlv_" + "0" * 32


@pytest.fixture
async def desk(api: Api, pool: Any, database: str) -> AsyncIterator[Desk]:
    async with open_desk(api, pool, database) as desk:
        yield desk


async def test_a_delivery_is_listed_and_shown_to_the_byte(desk: Desk) -> None:
    webhook = await desk.webhook(headers={"X-Tenant": "7"})
    await desk.start()
    [event] = await desk.emit("email.sent")
    [listed] = await desk.settled(webhook, 1)
    [arrival] = desk.receiver.arrivals
    assert listed["id"] == arrival.headers["X-Trackpost-Delivery"]
    expected = {
        "webhook_id": webhook, "event_id": event, "event_type": "email.sent", "status": "delivered", "attempts": 1,
        "status_code": 200, "result": "2xx", "error": None, "redelivery": False, "next_attempt_at": None,
    }  # fmt: skip
    assert {name: listed[name] for name in expected} == expected
    shown = await desk.ask("GET", f"/deliveries/{listed['id']}")
    assert shown["request_body"].encode() == arrival.body
    [attempt] = shown["attempts"]
    assert (attempt["number"], attempt["status"], attempt["response_body"]) == (1, 200, "ok")
    assert attempt["response_headers"] == {"Content-Length": "2"}
    assert attempt["webhook_changed"] is False
    hidden = {"X-Trackpost-Signature", "webhook-signature", "webhook-timestamp"}
    sent = {name: WITHHELD if name in hidden else value for name, value in arrival.headers.items()}
    assert attempt["request_headers"] == sent  # what is shown is what the deliverer's bytes said


async def test_a_failing_delivery_waits_for_its_retry_and_says_when(desk: Desk) -> None:
    webhook = await desk.webhook(retry=["1h"])
    desk.receiver.answer = lambda arrival: (503, "X-Why: busy\r\n")
    await desk.start()
    await desk.emit("email.sent")
    [listed] = await until(lambda: desk.deliveries(webhook, status="retrying"))
    assert (listed["attempts"], listed["status_code"]) == (1, 503)
    assert listed["next_attempt_at"] > listed["updated_at"]
    shown = await desk.ask("GET", f"/deliveries/{listed['id']}")
    assert shown["attempts"][0]["next_attempt_at"] == listed["next_attempt_at"]
    assert shown["attempts"][0]["response_headers"]["X-Why"] == "busy"


async def test_what_a_pause_holds_is_listed_as_pending(desk: Desk) -> None:
    webhook = await desk.webhook()
    await desk.ask("POST", f"/webhooks/{webhook}/pause")
    await desk.start()
    events = await desk.emit("email.sent", "email.opened", "email.bounced")
    found = await until(lambda: _when(3, desk.deliveries(webhook)))
    assert [each["event_id"] for each in found] == events[::-1]
    assert {each["status"] for each in found} == {"pending"}
    assert (await desk.ask("GET", f"/deliveries/{found[0]['id']}"))["attempts"] == []
    assert [each["event_id"] for each in await desk.deliveries(webhook, type="email.opened")] == [events[1]]
    assert await desk.deliveries(webhook, status="in_flight") == []


async def test_a_delivery_whose_request_is_out_is_in_flight(desk: Desk) -> None:
    webhook, other = await desk.webhook(retry=[0.3, "1h"], max_concurrency=1), await desk.webhook("/other")
    never = asyncio.get_running_loop().create_future()
    desk.receiver.answer = lambda arrival: never if arrival.attempt == 2 else 500
    await desk.start()
    first, second = await desk.emit("email.sent", "email.opened")
    await until(lambda: any(arrival.attempt == 2 for arrival in desk.receiver.arrivals))
    [out] = await desk.deliveries(webhook, status="in_flight")
    assert {name: out[name] for name in ("status", "attempts", "status_code", "next_attempt_at")} == {
        "status": "in_flight", "attempts": 1, "status_code": 500, "next_attempt_at": None,
    }  # fmt: skip
    assert out["event_id"] in {first, second}
    assert (await desk.ask("GET", f"/deliveries/{out['id']}"))["status"] == "in_flight"
    by_event = await desk.deliveries(webhook, event_id=out["event_id"])
    assert [each["status"] for each in by_event] == ["in_flight"]
    states = {each["event_id"]: each["status"] for each in await desk.deliveries(webhook)}
    assert states.pop(out["event_id"]) == "in_flight"
    assert out["id"] not in [each["id"] for each in await desk.deliveries(webhook, status="retrying")]
    assert await desk.deliveries(other, status="in_flight") == []
    never.set_result(200)
    await desk.settled(webhook, 2)
    assert await desk.deliveries(webhook, status="in_flight") == []
    assert len(await desk.deliveries(webhook, status="delivered")) == 2


async def _when(count: int, found: Any) -> Any:
    listed = await found
    return listed if len(listed) == count else None


@pytest.mark.parametrize("style", ["compact", "python"])
async def test_the_body_is_shown_in_the_style_it_was_sent_in(desk: Desk, style: str) -> None:
    webhook = await desk.webhook(body_style=style)
    await desk.start()
    await desk.emit("email.sent")
    [listed] = await desk.settled(webhook, 1)
    shown = await desk.ask("GET", f"/deliveries/{listed['id']}")
    assert shown["request_body"].encode() == desk.receiver.arrivals[0].body


async def test_filters_pick_by_state_answer_type_event_and_time(desk: Desk) -> None:
    webhook = await desk.webhook()
    desk.receiver.answer = lambda arrival: 400 if arrival.headers["X-Trackpost-Event"] == "email.opened" else 200
    await desk.start()
    sent, opened = await desk.emit("email.sent", "email.opened")
    await desk.settled(webhook, 2)

    async def ids(**query: Any) -> set[str]:
        return {each["event_id"] for each in await desk.deliveries(webhook, **query)}

    both = {sent, opened}
    assert both <= await ids()
    assert await ids(status="exhausted") == {opened}
    assert await ids(status_class="4xx") == {opened}
    assert sent in await ids(status_class="2xx")
    assert await ids(type="email.sent") == {sent}
    assert await ids(event_id=opened) == {opened}
    assert await ids(event_id=opened, status="delivered") == set()
    assert await ids(event_id="evt_unknown") == set()
    assert both <= await ids(since="2020-01-01T00:00:00+00:00")
    assert await ids(until="2020-01-01T00:00:00Z") == set()
    assert await ids(since="2999-01-01T00:00:00Z") == set()


async def test_what_a_filter_cannot_mean_is_refused(desk: Desk) -> None:
    webhook = await desk.webhook()
    wrong: list[tuple[dict[str, str], str]] = [
        ({"status": "lost"}, "status"), ({"status_class": "9xx"}, "status_class"), ({"type": "Nope"}, "type"),
        ({"since": "yesterday"}, "since"), ({"since": "2025-01-01T00:00:00"}, "since"),
        ({"since": "2025-01-02T00:00:00Z", "until": "2025-01-01T00:00:00Z"}, "until"),
        ({"event_id": ""}, "event_id"), ({"event_id": "evt_'"}, "event_id"),
        ({"after": NOWHERE}, "after"), ({"before": "nonsense"}, "before"), ({"offset": "3"}, "offset"),
        ({"after": f"ffffffffffffffff-{'0' * 32}"}, "after"),
    ]  # fmt: skip
    for query, field in wrong:
        answer = await desk.api("GET", f"/v1/webhooks/{webhook}/deliveries", params=query)
        assert (answer.status, answer.fields) == (422, [field]), query


async def test_pages_show_everything_once_in_both_directions_while_more_comes_in(desk: Desk) -> None:
    webhook = await desk.webhook()
    await desk.start()
    await desk.emit(*["email.sent"] * 7)
    whole = [each["id"] for each in await desk.settled(webhook, 7)]
    path = f"/webhooks/{webhook}/deliveries"
    first = await desk.ask("GET", path, params={"limit": "3"})
    await desk.emit("email.opened")
    await desk.settled(webhook, 8)
    second = await desk.ask("GET", path, params={"limit": "3", "after": first["next"]})
    third = await desk.ask("GET", path, params={"limit": "3", "after": second["next"]})
    assert [each["id"] for page in (first, second, third) for each in page["data"]] == whole
    assert (third["has_more"], third["next"]) == (False, None)
    back = await desk.ask("GET", path, params={"limit": "3", "before": whole[5]})
    assert [each["id"] for each in back["data"]] == whole[2:5]
    further = await desk.ask("GET", path, params={"limit": "9", "before": back["next"]})
    assert [each["id"] for each in further["data"]][1:] == whole[:2]


async def test_another_accounts_deliveries_are_not_there(desk: Desk) -> None:
    webhook = await desk.webhook()
    await desk.start()
    await desk.emit("email.sent")
    [listed] = await desk.settled(webhook, 1)
    rival = desk.api.keys["rival"]
    one = f"/v1/deliveries/{listed['id']}"
    for method, path in (
        ("GET", one), ("POST", f"{one}/retry"), ("GET", f"/v1/webhooks/{webhook}/deliveries"),
        ("GET", f"/v1/webhooks/{webhook}/stats"), ("POST", f"/v1/webhooks/{webhook}/test"),
        ("POST", f"/v1/webhooks/{webhook}/rotate-secret"),
    ):  # fmt: skip
        assert (await desk.api(method, path, key=rival)).status == 404
    assert (await desk.api("GET", f"/v1/deliveries/{NOWHERE}")).status == 404
    assert (await desk.api("GET", "/v1/deliveries/dlv_x")).status == 404


# ── once more ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_retry_by_hand_arrives_as_a_delivery_of_its_own(desk: Desk) -> None:
    webhook = await desk.webhook()
    desk.receiver.answer = lambda arrival: 400
    await desk.start()
    [event] = await desk.emit("email.sent")
    # `webhook.failing` may have been settled too by now.
    [old] = [one for one in await desk.settled(webhook, 1) if one["event_id"] == event]
    desk.receiver.answer = lambda arrival: 200
    answer = await desk.api("POST", f"/v1/deliveries/{old['id']}/retry")
    made = answer.json
    assert answer.status == 201
    assert answer.headers["Location"] == f"/v1/deliveries/{made['id']}"
    assert (made["status"], made["redelivery"], made["attempts"]) == ("pending", True, 0)

    async def ended() -> Any:
        shown = await desk.ask("GET", f"/deliveries/{made['id']}")
        return shown if shown["status"] == "delivered" else None

    shown = await until(ended)
    assert (shown["event_id"], len(shown["attempts"])) == (event, 1)
    last = desk.receiver.of(event)[-1]
    assert (last.headers["X-Trackpost-Delivery"], last.attempt) == (made["id"], 1)
    assert last.body == desk.receiver.of(event)[0].body
    assert (await desk.ask("GET", f"/deliveries/{old['id']}"))["status"] == "exhausted"
    assert len(await desk.deliveries(webhook, event_id=event)) == 2


async def test_a_retry_made_while_no_engine_runs_is_not_lost(desk: Desk) -> None:
    webhook = await desk.webhook()
    running = await desk.start()
    await desk.emit("email.sent")
    [old] = await desk.settled(webhook, 1)
    await desk.house.stop(running)
    await desk.ask("POST", f"/deliveries/{old['id']}/retry", status=201)
    await desk.start()
    await desk.settled(webhook, 2)
    assert len(desk.receiver.arrivals) == 2


async def test_a_retry_right_after_a_resume_is_not_taken_for_one_of_a_disabled_webhook(desk: Desk) -> None:
    webhook = await desk.webhook()
    desk.receiver.answer = lambda arrival: 410
    await desk.start()
    [event] = await desk.emit("email.sent")
    [old] = await desk.settled(webhook, 1)
    refused = await desk.api("POST", f"/v1/deliveries/{old['id']}/retry")
    assert (refused.status, refused.json["code"]) == (409, "webhook_disabled")
    desk.receiver.answer = lambda arrival: 200
    await desk.ask("POST", f"/webhooks/{webhook}/resume")
    made = await desk.ask("POST", f"/deliveries/{old['id']}/retry", status=201)
    await until(lambda: len(desk.receiver.of(event)) == 2)
    assert desk.receiver.of(event)[-1].headers["X-Trackpost-Delivery"] == made["id"]


async def test_what_an_older_registry_does_not_know_is_not_taken_for_gone(desk: Desk) -> None:
    running = await desk.start()
    retries = running.engine._retries
    assert retries is not None
    newer = retries._registry().version + 1
    retries.told(99, newer)
    retries._heed()
    assert (dict(retries._told), retries._orphans) == ({99: newer}, {})
    del retries._told[99]
    retries.told(99, newer - 1)
    retries._heed()
    assert (retries._told, list(retries._orphans)) == ({}, [99])


async def test_a_retry_for_a_paused_webhook_waits_for_its_resumption(desk: Desk) -> None:
    webhook = await desk.webhook()
    await desk.start()
    await desk.emit("email.sent")
    [old] = await desk.settled(webhook, 1)
    await desk.ask("POST", f"/webhooks/{webhook}/pause")
    made = await desk.ask("POST", f"/deliveries/{old['id']}/retry", status=201)
    assert (await desk.ask("GET", f"/deliveries/{made['id']}"))["status"] == "pending"
    await desk.ask("POST", f"/webhooks/{webhook}/resume")
    await desk.settled(webhook, 2)


async def test_an_event_that_retention_dropped_cannot_be_sent_again_but_its_delivery_is_shown(desk: Desk) -> None:
    webhook = await desk.webhook()
    running = await desk.start()
    await desk.emit("email.sent")
    [old] = await desk.settled(webhook, 1)
    await desk.house.stop(running)
    await desk.app.execute("DELETE FROM dispatcher.outbox")
    shown = await desk.ask("GET", f"/deliveries/{old['id']}")
    assert (shown["event_id"], shown["request_body"], shown["attempts"][0]["request_headers"]) == (None, None, None)
    refused = await desk.api("POST", f"/v1/deliveries/{old['id']}/retry")
    assert (refused.status, refused.json["code"]) == (409, "event_gone")


# ── what came back, as JSON can hold it ────────────────────────────────────────────────────────────────────────────


def test_bodies_are_text_where_they_are_and_base64_elsewhere() -> None:
    assert readable(b"") == (None, "utf-8")
    assert readable("grüß".encode()) == ("grüß", "utf-8")
    assert readable("grüß".encode()[:-1]) == ("grü", "utf-8")  # cut off by us
    assert readable(b"\xff\x00") == (base64.b64encode(b"\xff\x00").decode(), "base64")
    json.dumps(readable(b"\x00")[0])


def test_repeated_header_fields_are_joined_whatever_their_case() -> None:
    assert headers_of(b"HTTP/1.1 200 OK\r\nX-A: 1\r\nx-a:2\r\nEmpty:\r\n") == {"X-A": "1, 2", "Empty": ""}
    assert headers_of(b"") == {}
    assert as_object([("A", "é")]) == {"A": "é"}
