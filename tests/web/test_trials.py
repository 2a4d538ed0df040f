"""Tests of a webhook, and secrets while they are replaced: what the handler sees, and what is told of it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
from counter import Desk, open_desk
from house import SECRET, Answer, Arrival, until

from dispatcher.core.signing import Signer, new_secret
from dispatcher.web import trials

if TYPE_CHECKING:
    from tests.web.conftest import Api

OTHER = new_secret(bytes(range(32)))


@pytest.fixture
async def desk(api: Api, pool: Any, database: str) -> AsyncIterator[Desk]:
    async with open_desk(api, pool, database) as desk:
        yield desk


def verified(arrival: Arrival, secret: str) -> bool:
    """As a handler with this secret that looks at X-Trackpost-Signature over the raw body."""
    given = arrival.headers.get("X-Trackpost-Signature", "")
    return hmac.compare_digest(hmac.new(secret.encode(), arrival.body, hashlib.sha256).hexdigest(), given)


def verified_by_standard(arrival: Arrival, secret: str) -> bool:
    headers = arrival.headers
    signature, at = headers["webhook-signature"], headers["webhook-timestamp"]
    return bool(Signer(secret).verify_standard(headers["webhook-id"], at, arrival.body, signature, now=time.time()))


def flask(arrival: Arrival) -> int:
    """A handler that hashes what json.dumps makes of the parsed body."""
    printed = json.dumps(json.loads(arrival.body)).encode()
    expected = hmac.new(SECRET.encode(), printed, hashlib.sha256).hexdigest()
    return 200 if expected == arrival.headers["X-Trackpost-Signature"] else 401


# ── trials ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_test_sends_the_sample_and_tells_what_came_back(desk: Desk) -> None:
    webhook = await desk.webhook(events=["email.bounced"], headers={"X-Tenant": "7"})
    desk.receiver.answer = lambda arrival: (202, "X-Seen: yes\r\n")
    told = await desk.ask("POST", f"/webhooks/{webhook}/test")
    [arrival] = desk.receiver.arrivals
    sample = next(entry.sample for entry in desk.api.parts.catalogue if entry.name == "email.bounced")
    assert arrival.data == sample
    assert verified(arrival, SECRET)
    assert verified_by_standard(arrival, SECRET)
    expected = {
        "delivered": True, "status": 202, "result": "2xx", "error": None, "type": "email.bounced",
        "event_id": arrival.event_id, "body_style": "compact", "body_style_accepted": "compact", "response_body": "ok",
        "response_headers": {"X-Seen": "yes", "Content-Length": "2"}, "request_headers": arrival.headers,
    }  # fmt: skip
    assert {name: told[name] for name in expected} == expected
    assert told["latency_ms"] >= 0
    assert told["request_body"].encode() == arrival.body


async def test_a_test_is_no_delivery(desk: Desk) -> None:
    webhook = await desk.webhook()
    desk.receiver.answer = lambda arrival: 500
    told = await desk.ask("POST", f"/webhooks/{webhook}/test", {"type": "email.sent"})
    assert (told["delivered"], told["status"], len(told["tries"])) == (False, 500, 1)
    assert await desk.deliveries(webhook) == []
    assert (await desk.ask("GET", f"/webhooks/{webhook}"))["failing_since"] is None


async def test_a_test_carries_the_head_a_delivery_would(desk: Desk) -> None:
    webhook = await desk.webhook(headers={"X-Tenant": "7"})
    await desk.ask("POST", f"/webhooks/{webhook}/test", {"type": "email.sent"})
    await desk.start()
    await desk.emit("email.sent")
    await desk.settled(webhook, 1)
    trial, delivery = desk.receiver.arrivals
    assert list(trial.headers) == list(delivery.headers)


async def test_a_handler_that_prints_as_flask_does_is_found_out(desk: Desk) -> None:
    webhook = await desk.webhook()
    desk.receiver.answer = flask
    told = await desk.ask("POST", f"/webhooks/{webhook}/test", {"type": "email.sent"})
    assert (told["delivered"], told["status"], told["body_style"]) == (False, 401, "compact")
    assert told["body_style_accepted"] == "python"
    assert [each["body_style"] for each in told["tries"]] == ["compact", "python"]
    await desk.ask("PATCH", f"/webhooks/{webhook}", {"body_style": "python"})
    assert (await desk.ask("POST", f"/webhooks/{webhook}/test"))["delivered"] is True


async def test_a_handler_that_refuses_everything_accepts_no_style(desk: Desk) -> None:
    webhook = await desk.webhook()
    desk.receiver.answer = lambda arrival: 403
    told = await desk.ask("POST", f"/webhooks/{webhook}/test")
    assert (told["body_style_accepted"], len(told["tries"])) == (None, 2)


async def test_data_of_ones_own_is_sent_and_data_nobody_could_be_sent_is_refused(desk: Desk) -> None:
    webhook = await desk.webhook()
    await desk.ask("POST", f"/webhooks/{webhook}/test", {"type": "invoice.paid", "data": {"a": 1}})
    assert desk.receiver.arrivals[0].data == {"a": 1}
    for body, field in (
        ({"type": "invoice.paid"}, "type"), ({"type": "Nope"}, "type"), ({"data": [1]}, "data"), ({"x": 1}, "x"),
    ):  # fmt: skip
        refused = await desk.api("POST", f"/v1/webhooks/{webhook}/test", body)
        assert (refused.status, refused.fields) == (422, [field])
    assert len(desk.receiver.arrivals) == 1


async def test_the_guard_stands_before_tests_too(desk: Desk) -> None:
    webhook = await desk.webhook()
    await desk.app.execute("UPDATE dispatcher.endpoint SET url = 'https://169.254.169.254/latest'")
    told = await desk.ask("POST", f"/webhooks/{webhook}/test")
    assert (told["delivered"], told["status"], told["result"]) == (False, None, "blocked")
    assert "169.254.169.254" in told["error"]


async def test_nobody_there_is_an_answer_too(desk: Desk) -> None:
    webhook = await desk.webhook()
    await desk.receiver.stop()
    told = await desk.ask("POST", f"/webhooks/{webhook}/test")
    assert (told["delivered"], told["status"], told["result"]) == (False, None, "connect")
    assert told["error"]


async def test_an_unsigned_webhook_is_tested_without_a_signature(desk: Desk) -> None:
    webhook = await desk.webhook()
    await desk.ask("PATCH", f"/webhooks/{webhook}", {"secret": None})
    desk.receiver.answer = lambda arrival: 401
    told = await desk.ask("POST", f"/webhooks/{webhook}/test")
    assert [each["secret"] for each in told["tries"]] == [None]
    assert "X-Trackpost-Signature" not in desk.receiver.arrivals[0].headers


async def test_tests_under_way_are_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "TRIALS_MAX", 0)
    webhook = await desk.webhook()
    refused = await desk.api("POST", f"/v1/webhooks/{webhook}/test")
    assert (refused.status, refused.json["code"]) == (429, "too_many_tests")
    assert int(refused.headers["Retry-After"]) > 0


# ── rotation ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_while_a_secret_is_replaced_both_sign(desk: Desk) -> None:
    webhook = await desk.webhook()
    await desk.start()
    told = await desk.ask("POST", f"/webhooks/{webhook}/rotate-secret", {"secret": OTHER})
    assert told["secret"] == OTHER
    assert told["previous_secret_expires_at"] > told["updated_at"]
    assert (await desk.ask("GET", f"/webhooks/{webhook}/secret"))["secret"] == OTHER
    await desk.emit("email.sent")
    await desk.settled(webhook, 1)
    [arrival] = desk.receiver.arrivals
    assert verified(arrival, OTHER)
    assert verified_by_standard(arrival, OTHER)
    assert verified_by_standard(arrival, SECRET)


async def test_a_receiver_that_has_not_changed_over_yet_is_given_the_old_signature_at_once(desk: Desk) -> None:
    webhook = await desk.webhook(retry=["1h"])
    await desk.start()
    await desk.ask("POST", f"/webhooks/{webhook}/rotate-secret", {"secret": OTHER})
    desk.receiver.answer = lambda arrival: 200 if verified(arrival, SECRET) else 401
    await desk.emit("email.sent")
    [listed] = await desk.settled(webhook, 1)
    assert (listed["status"], listed["attempts"]) == ("delivered", 1)
    assert [arrival.attempt for arrival in desk.receiver.arrivals] == [1, 1]
    told = await desk.ask("POST", f"/webhooks/{webhook}/test")
    assert [(each["secret"], each["status"]) for each in told["tries"]] == [("current", 401), ("previous", 200)]


async def test_without_grace_the_old_secret_ends_at_once(desk: Desk) -> None:
    webhook = await desk.webhook()
    await desk.start()
    told = await desk.ask("POST", f"/webhooks/{webhook}/rotate-secret", {"grace_s": 0})
    assert told["secret"].startswith("whsec_")
    assert told["previous_secret_expires_at"] is None
    await desk.emit("email.sent")
    await desk.settled(webhook, 1)
    [arrival] = desk.receiver.arrivals
    assert verified_by_standard(arrival, told["secret"])
    assert not verified_by_standard(arrival, SECRET)


async def test_a_patched_secret_ends_a_rotation(desk: Desk) -> None:
    webhook = await desk.webhook()
    await desk.ask("POST", f"/webhooks/{webhook}/rotate-secret")
    shown = await desk.ask("PATCH", f"/webhooks/{webhook}", {"secret": OTHER})
    assert shown["previous_secret_expires_at"] is None


async def test_a_rotation_that_makes_no_sense_is_refused(desk: Desk) -> None:
    webhook = await desk.webhook()
    for body, field in (({"grace_s": -1}, "grace_s"), ({"secret": ""}, "secret"), ({"secret": "a\n"}, "secret")):
        refused = await desk.api("POST", f"/v1/webhooks/{webhook}/rotate-secret", body)
        assert (refused.status, refused.fields) == (422, [field])
    stale = await desk.api("POST", f"/v1/webhooks/{webhook}/rotate-secret", headers={"If-Match": '"99"'})
    assert stale.status == 412


# ── what an account is told of its webhooks ────────────────────────────────────────────────────────────────────────


async def news(desk: Desk) -> list[tuple[str, dict[str, Any]]]:
    rows = await desk.app.fetch(
        "SELECT type, data FROM dispatcher.outbox WHERE account = 'acme' AND type LIKE 'webhook.%' ORDER BY seq"
    )
    return [(row["type"], json.loads(row["data"])) for row in rows]


async def test_the_first_delivery_given_up_is_news_and_news_of_news_there_is_none(desk: Desk) -> None:
    webhook = await desk.webhook(events=["*"])  # so for the news of itself too
    desk.receiver.answer = lambda arrival: 400
    await desk.start()
    await desk.emit("email.sent", "email.sent")
    await desk.settled(webhook, 3)
    [(kind, data)] = await news(desk)
    assert kind == "webhook.failing"
    assert (data["webhook_id"], data["url"], data["reason"]) == (webhook, desk.receiver.url + "/", "400")
    assert data["since"].endswith("Z")


async def test_a_webhook_that_refuses_only_the_news_makes_none(desk: Desk) -> None:
    gate = asyncio.Event()

    async def refuse() -> int:
        await gate.wait()
        return 400

    def answer(arrival: Arrival) -> Answer:
        kind = arrival.headers["X-Trackpost-Event"]
        return refuse() if kind == "webhook.failing" else 400 if kind == "email.bounced" else 200

    webhook = await desk.webhook(events=["*"])
    desk.receiver.answer = answer
    await desk.start()
    await desk.emit("email.bounced")
    await until(lambda: len(desk.receiver.arrivals) == 2)  # and the news of it
    await desk.emit("email.sent")
    await desk.settled(webhook, 2)  # a success, so what is given up next would be the first again
    gate.set()
    await desk.settled(webhook, 3)
    assert [kind for kind, _ in await news(desk)] == ["webhook.failing"]
    await desk.emit("email.bounced")
    await desk.settled(webhook, 5)
    assert [kind for kind, _ in await news(desk)] == ["webhook.failing"] * 2


async def test_after_days_of_nothing_but_failures_a_webhook_is_disabled_and_its_account_told(desk: Desk) -> None:
    webhook = await desk.webhook("/bad")
    witness = await desk.webhook("/good", events=["webhook.disabled"])
    desk.receiver.answer = lambda arrival: 500 if arrival.path == "/bad" else 200
    key = await desk.key(webhook)
    await desk.app.execute(
        "INSERT INTO dispatcher.endpoint_health (endpoint_id, failing_since, exhausted_at)"
        " VALUES ($1, now() - interval '5 days', now())",
        key,
    )
    await desk.start(disable_after_s=5 * 86400.0 - 1)
    await desk.emit("email.sent")
    await desk.settled(witness, 1)
    shown = await desk.ask("GET", f"/webhooks/{webhook}")
    assert shown["status"] == "disabled"
    assert shown["disabled_reason"].startswith("nothing but failures since ")
    [(kind, data)] = await news(desk)
    assert (kind, data["webhook_id"], data["reason"]) == ("webhook.disabled", webhook, shown["disabled_reason"])
    assert desk.receiver.at("/good")[0].data == data


async def test_a_webhook_is_not_disabled_before_its_time_nor_where_that_is_switched_off(desk: Desk) -> None:
    webhook = await desk.webhook()
    desk.receiver.answer = lambda arrival: 500
    await desk.app.execute(
        "INSERT INTO dispatcher.endpoint_health (endpoint_id, failing_since, exhausted_at)"
        " VALUES ($1, now() - interval '5 days', now())",
        await desk.key(webhook),
    )
    running = await desk.start(disable_after_s=6 * 86400.0)
    await desk.emit("email.sent")
    await desk.settled(webhook, 1)
    running.engine.ledger.disable_after_s = None
    await desk.emit("email.sent")
    await desk.settled(webhook, 2)
    await until(lambda: not running.engine.ledger.buffered)
    assert (await desk.ask("GET", f"/webhooks/{webhook}"))["status"] == "active"
