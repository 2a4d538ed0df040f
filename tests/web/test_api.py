"""Every call: what it does, and what it refuses."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import io
import json
import threading
from itertools import chain
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from dispatcher.config import Log as LogSettings
from dispatcher.core.addresses import Guard
from dispatcher.core.rendering import check_data
from dispatcher.logs import start_logging
from dispatcher.store.endpoints import EndpointHealth
from dispatcher.web import bodies, changes
from dispatcher.web.parts import Web

if TYPE_CHECKING:
    from tests.web.conftest import Api

GUIDE = {
    "url": "https://yourapp.com/webhooks/trackpost",
    "events": ["email.delivered", "email.bounced", "email.opened", "email.clicked"],
    "secret": "your_webhook_secret",
}
NOWHERE = "wh_0190000000007000800000000000abcd"


def check_problem(answer: Any, status: int, code: str, fields: list[str] | None = None) -> None:
    assert answer.status == status, answer.text
    assert answer.headers["Content-Type"].startswith("application/problem+json")
    document = answer.json
    assert document["type"] == "about:blank"
    assert document["status"] == status
    assert document["code"] == code
    assert document["title"]
    assert document["detail"]
    assert ("errors" in document) == (status == 422)
    if status == 422:
        assert all(error["message"] for error in document["errors"])
        assert answer.fields == fields


# ── webhooks ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_guides_own_call_makes_a_webhook(api: Api) -> None:
    answer = await api("POST", "/v1/webhooks", GUIDE)
    assert answer.status == 201
    made = answer.json
    assert answer.headers["Location"] == f"/v1/webhooks/{made['id']}"
    assert made["id"].startswith("wh_")
    assert made["created_at"].endswith("Z")
    assert {name: made[name] for name in GUIDE} == GUIDE
    expected: dict[str, Any] = {
        "status": "active", "disabled_reason": None, "signed": True, "description": "", "headers": {},
        "body_style": "compact", "retry": ["1m", "10m", "1h"], "max_concurrency": 16, "rate_limit": None,
        "ordered": False, "timeout_s": 30, "failing_since": None, "last_error": None, "updated_at": made["created_at"],
    }  # fmt: skip
    assert {name: made[name] for name in expected} == expected


async def test_a_secret_is_made_where_none_is_given_and_null_means_unsigned(api: Api) -> None:
    made, unsigned = await api.webhook(), await api.webhook(secret=None)
    assert made["secret"].startswith("whsec_")
    assert (made["signed"], unsigned["signed"], unsigned["secret"]) == (True, False, None)
    revealed = await api("GET", f"/v1/webhooks/{made['id']}/secret")
    assert revealed.json == {"secret": made["secret"]}
    assert (await api("GET", f"/v1/webhooks/{unsigned['id']}/secret")).json == {"secret": None}


async def test_the_secret_is_in_no_read_and_no_list(api: Api) -> None:
    made = await api.webhook(secret="hush")
    one, many = await api("GET", f"/v1/webhooks/{made['id']}"), await api("GET", "/v1/webhooks")
    assert "hush" not in one.text + many.text
    assert one.json == {name: value for name, value in made.items() if name != "secret"}
    assert many.json == {"data": [one.json], "has_more": False, "next": None}


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"retry": "none"}, {"retry": "none"}),
        ({"retry": "standard"}, {"retry": "standard"}),
        ({"retry": "default"}, {"retry": ["1m", "10m", "1h"]}),
        ({"retry": []}, {"retry": []}),
        ({"retry": ["1m", 90, "250ms", 0.5]}, {"retry": ["1m", "90s", "250ms", "500ms"]}),
        ({"events": ["email.sent", "email.*", "email.sent"]}, {"events": ["email.sent", "email.*"]}),
        ({"events": ["billing.eu.*"]}, {"events": ["billing.eu.*"]}),
        ({"headers": {"X-Tenant": " a b "}}, {"headers": {"X-Tenant": "a b"}}),
        ({"body_style": "python", "ordered": True}, {"body_style": "python", "ordered": True}),
        ({"max_concurrency": 16, "rate_limit": 10000}, {"max_concurrency": 16, "rate_limit": 10000}),
        ({"timeout_s": 0.1, "description": "héllo\n🎉"}, {"timeout_s": 0.1, "description": "héllo\n🎉"}),
        ({"description": None, "headers": None, "retry": None, "max_concurrency": None, "ordered": None},
         {"description": "", "headers": {}, "retry": ["1m", "10m", "1h"], "max_concurrency": 16, "ordered": False}),
    ],
)  # fmt: skip
async def test_what_is_set_is_what_is_shown(api: Api, settings: dict[str, Any], shown: dict[str, Any]) -> None:
    made = await api.webhook(**settings)
    assert {name: made[name] for name in shown} == shown
    again = (await api("GET", f"/v1/webhooks/{made['id']}")).json
    assert {name: again[name] for name in shown} == shown


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"url": "http://example.com/"}, ["url"]),
        ({"url": "https://127.0.0.1/"}, ["url"]),
        ({"url": "https://0x7f.1/"}, ["url"]),
        ({"url": "https://[::ffff:10.0.0.1]/"}, ["url"]),
        ({"url": "https://169.254.169.254/latest"}, ["url"]),
        ({"url": "https://user:pass@example.com/"}, ["url"]),
        ({"url": "ftp://example.com/"}, ["url"]),
        ({"url": "not a url"}, ["url"]),
        ({"url": ""}, ["url"]),
        ({"url": "https://example.com/\x00"}, ["url"]),
        ({"url": "https://example.com/" + "x" * 3000}, ["url"]),
        ({"url": None}, ["url"]),
        ({"url": 7}, ["url"]),
        ({"events": []}, ["events"]),
        ({"events": ["*"] * 101}, ["events"]),
        ({"events": "email.sent"}, ["events"]),
        ({"events": None}, ["events"]),
        ({"events": ["email.sent", "email.deliverd"]}, ["events[1]"]),
        ({"events": ["nope", "*", "email.*.x"]}, ["events[0]", "events[2]"]),
        ({"events": ["email.sent", 5]}, ["events[1]"]),
        ({"events": ["nope"] * 100}, [f"events[{n}]" for n in range(20)]),
        ({"secret": ""}, ["secret"]),
        ({"secret": "x" * 257}, ["secret"]),
        ({"secret": "two\nlines"}, ["secret"]),
        ({"secret": 5}, ["secret"]),
        ({"description": "x" * 1025}, ["description"]),
        ({"description": "nul\x00"}, ["description"]),
        ({"headers": {f"X-{n}": "v" for n in range(300)}}, ["headers"]),
        ({"headers": {"X-Foo": "a\r\nX-Evil: 1"}}, ["headers.X-Foo"]),
        ({"headers": {"X-Foo": "nul\x00"}}, ["headers.X-Foo"]),
        ({"headers": {"Host": "x", "Content-Type": "x", "webhook-id": "x"}},
         ["headers.Host", "headers.Content-Type", "headers.webhook-id"]),
        ({"headers": {"X-Trackpost-Signature": "x"}}, ["headers.X-Trackpost-Signature"]),
        ({"headers": {"X-A": "1", "X-Foo": 5}}, ["headers.X-Foo"]),
        ({"headers": {f"X-{n}": "v" for n in range(20)} | {"Host": "x"}}, ["headers"]),
        ({"headers": {"X-Long": "v" * 4097, "X-É": "v"}}, ["headers.X-Long", "headers.X-\\xc9"]),
        ({"headers": []}, ["headers"]),
        ({"body_style": "yaml"}, ["body_style"]),
        ({"retry": "sometimes"}, ["retry"]),
        ({"retry": ["1m", "soon", -1]}, ["retry[1]", "retry[2]"]),
        ({"retry": ["1m", True]}, ["retry[1]"]),
        ({"retry": ["31d"]}, ["retry"]),
        ({"retry": ["1s"] * 51}, ["retry"]),
        ({"max_concurrency": 0}, ["max_concurrency"]),
        ({"max_concurrency": 17}, ["max_concurrency"]),
        ({"max_concurrency": 1.5}, ["max_concurrency"]),
        ({"max_concurrency": 10**30}, ["max_concurrency"]),
        ({"rate_limit": 0}, ["rate_limit"]),
        ({"rate_limit": 10001}, ["rate_limit"]),
        ({"rate_limit": True}, ["rate_limit"]),
        ({"ordered": "yes"}, ["ordered"]),
        ({"timeout_s": 0.05}, ["timeout_s"]),
        ({"timeout_s": 301}, ["timeout_s"]),
        ({"evnets": ["*"], "colour": "red"}, ["evnets", "colour"]),
        ({"id": "wh_mine"}, ["id"]),
        ({f"colour_{n}": "red" for n in range(100)}, [""]),
        ({"url": "http://example.com/", "events": ["x.y"], "timeout_s": "long", "retries": 3},
         ["retries", "timeout_s", "url", "events[0]"]),
    ],
)  # fmt: skip
async def test_a_mistake_in_a_webhook_is_named(api: Api, settings: dict[str, Any], fields: list[str]) -> None:
    body = {"url": "https://example.com/hook", "events": ["*"], **settings}
    check_problem(await api("POST", "/v1/webhooks", body), 422, "invalid_request", fields)
    made = await api.webhook()
    check_problem(await api("PATCH", f"/v1/webhooks/{made['id']}", settings), 422, "invalid_request", fields)
    assert (await api("GET", "/v1/webhooks")).json["data"][0]["updated_at"] == made["updated_at"]


async def test_what_is_missing_is_named(api: Api) -> None:
    check_problem(await api("POST", "/v1/webhooks", {}), 422, "invalid_request", ["url", "events"])


async def test_a_typing_mistake_gets_the_nearest_name(api: Api) -> None:
    answer = await api("POST", "/v1/webhooks", {**GUIDE, "events": ["email.deliverd"], "evnts": []})
    messages = [error["message"] for error in answer.json["errors"]]
    assert "did you mean events?" in messages[0]
    assert 'did you mean "email.delivered"?' in messages[1]


async def test_messages_say_what_would_be_right(api: Api) -> None:
    answer = await api("POST", "/v1/webhooks", {**GUIDE, "timeout_s": 301, "events": ["*", 5], "headers": {"X": None}})
    assert {error["field"]: error["message"] for error in answer.json["errors"]} == {
        "timeout_s": "expected a number of seconds from 0.1 to 300, not 301",
        "events[1]": "expected text, got a whole number",
        "headers.X": "expected text, got null",
    }


async def test_opened_networks_and_plain_http_follow_the_guard(api: Api) -> None:
    api.parts.guard = Guard(["127.0.0.0/8"], allow_http=True)
    assert (await api.webhook(url="http://127.0.0.1:8000/hook"))["url"] == "http://127.0.0.1:8000/hook"


async def test_a_webhook_made_under_a_larger_ceiling_shows_what_is_in_effect(api: Api) -> None:
    made = await api.webhook(max_concurrency=16)
    api.parts.defaults = _replace(api.parts, max_concurrency=4)
    assert (await api("GET", f"/v1/webhooks/{made['id']}")).json["max_concurrency"] == 4


def _replace(parts: Web, **changes: Any) -> Any:
    return dataclasses.replace(parts.defaults, **changes)


async def test_patch_changes_what_it_names_and_nothing_else(api: Api) -> None:
    made = await api.webhook(description="first", retry="none", secret="old")
    path = f"/v1/webhooks/{made['id']}"
    changed = (await api("PATCH", path, {"url": "https://example.com/other", "retry": None})).json
    expected = {**made, "url": "https://example.com/other", "retry": ["1m", "10m", "1h"]}
    del expected["secret"], expected["updated_at"], changed["updated_at"]
    assert changed == expected
    assert (await api("GET", f"{path}/secret")).json == {"secret": "old"}


async def test_patch_replaces_the_secret_at_once(api: Api) -> None:
    made = await api.webhook(secret="old")
    path = f"/v1/webhooks/{made['id']}"
    assert "new" not in (await api("PATCH", path, {"secret": "new"})).text
    assert (await api("GET", f"{path}/secret")).json == {"secret": "new"}
    assert (await api("PATCH", path, {"secret": None})).json["signed"] is False


async def test_an_empty_patch_changes_nothing(api: Api) -> None:
    made = await api.webhook()
    before = await api("GET", f"/v1/webhooks/{made['id']}")
    after = await api("PATCH", f"/v1/webhooks/{made['id']}", {})
    assert (after.status, after.json, after.headers["ETag"]) == (200, before.json, before.headers["ETag"])


@pytest.mark.parametrize(
    ("method", "suffix", "body"), [("PATCH", "", {"description": "x"}), ("DELETE", "", None), ("POST", "/pause", None)]
)
async def test_if_match_guards_a_change(api: Api, method: str, suffix: str, body: Any) -> None:
    path = f"/v1/webhooks/{(await api.webhook())['id']}"
    etag = (await api("GET", path)).headers["ETag"]
    for other in ('"999"', f"W/{etag}", '"998", "999"'):
        answer = await api(method, path + suffix, body, headers={"If-Match": other})
        check_problem(answer, 412, "precondition_failed")
        assert (await api("GET", path)).headers["ETag"] == answer.headers["ETag"] == etag
    assert (await api(method, path + suffix, body, headers={"If-Match": f'"999", {etag}'})).status in (200, 204)


@pytest.mark.parametrize("given", ["nonsense", "1", '"1', ""])
async def test_an_if_match_that_is_none_is_no_licence_to_change(api: Api, given: str) -> None:
    path = f"/v1/webhooks/{(await api.webhook())['id']}"
    for method, suffix, body in (("PATCH", "", {"ordered": True}), ("DELETE", "", None), ("POST", "/pause", None)):
        answer = await api(method, path + suffix, body, headers={"If-Match": given})
        check_problem(answer, 422, "invalid_request", ["If-Match"])
    assert ((await api("GET", path)).json["ordered"], (await api("GET", path)).json["status"]) == (False, "active")


async def test_if_match_any_asks_only_that_there_is_one(api: Api) -> None:
    path = f"/v1/webhooks/{(await api.webhook())['id']}"
    assert (await api("PATCH", path, {"ordered": True}, headers={"If-Match": "*"})).status == 200


async def test_changes_at_the_same_time_all_count(api: Api) -> None:
    made = await api.webhook()
    path = f"/v1/webhooks/{made['id']}"
    wanted: list[dict[str, Any]] = [
        {"description": "mine"}, {"ordered": True}, {"rate_limit": 3.0}, {"timeout_s": 7.0}, {"max_concurrency": 2},
        {"headers": {"X-Mine": "1"}}, {"body_style": "python"}, {"events": ["email.*"]}, {"retry": ["5s"]},
        {"url": "https://example.com/other"},
    ]  # fmt: skip
    answers = await asyncio.gather(*(api("PATCH", path, change) for change in wanted))
    assert [answer.status for answer in answers] == [200] * len(wanted)
    now = (await api("GET", path)).json
    assert {name: now[name] for change in wanted for name in change} == {k: v for c in wanted for k, v in c.items()}


async def test_a_change_that_never_finds_its_version_gives_up(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await api.webhook()

    async def lose(*_: Any, **__: Any) -> None:
        return None

    monkeypatch.setattr(api.parts.endpoints, "update", lose, raising=False)
    monkeypatch.setattr(changes, "WAY_S", (0.0, 0.0))
    answer = await api("PATCH", f"/v1/webhooks/{made['id']}", {"ordered": True})
    check_problem(answer, 409, "conflict")


async def test_delete_removes(api: Api) -> None:
    path = f"/v1/webhooks/{(await api.webhook())['id']}"
    gone = await api("DELETE", path)
    assert (gone.status, gone.text) == (204, "")
    check_problem(await api("DELETE", path), 404, "not_found")


async def test_pause_and_resume_are_repeatable(api: Api) -> None:
    path = f"/v1/webhooks/{(await api.webhook())['id']}"
    for verb, status in [("pause", "paused"), ("pause", "paused"), ("resume", "active"), ("resume", "active")]:
        answer = await api("POST", f"{path}/{verb}")
        assert (answer.status, answer.json["status"]) == (200, status)
    assert (await api("GET", path)).headers["ETag"] == '"3"'


async def test_resume_reactivates_a_disabled_webhook_and_forgets_its_failures(api: Api, pool: asyncpg.Pool) -> None:
    path = f"/v1/webhooks/{(await api.webhook())['id']}"
    number, now = await pool.fetchval("SELECT id FROM dispatcher.endpoint"), await pool.fetchval("SELECT now()")
    await api.parts.endpoints.learn({number: "410 Gone"}, [EndpointHealth(number, now, now, "410")])
    disabled = (await api("GET", path)).json
    assert (disabled["status"], disabled["disabled_reason"], disabled["last_error"]) == ("disabled", "410 Gone", "410")
    assert disabled["failing_since"].endswith("Z")
    check_problem(await api("POST", f"{path}/pause"), 409, "webhook_disabled")
    resumed = (await api("POST", f"{path}/resume")).json
    assert (resumed["status"], resumed["disabled_reason"]) == ("active", None)
    assert (resumed["failing_since"], resumed["last_error"]) == (None, None)
    assert await api.parts.endpoints.health() == {}


# ── lists ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def walk(api: Api, path: str, **query: str) -> list[list[str]]:
    """The ids of each page, from the newest on."""
    pages: list[list[str]] = []
    while True:
        document = (await api("GET", path, params=query)).json
        pages.append([entry["id"] for entry in document["data"]])
        assert document["has_more"] == (document["next"] is not None)
        if document["next"] is None:
            return pages
        query["after"] = document["next"]


async def test_pages_of_webhooks_hold_each_once_newest_first(api: Api) -> None:
    made = [(await api.webhook())["id"] for _ in range(5)]
    newest = sorted(made, reverse=True)
    assert await walk(api, "/v1/webhooks", limit="2") == [newest[:2], newest[2:4], newest[4:]]


async def test_before_goes_towards_newer_ones(api: Api) -> None:
    for _ in range(5):
        await api.webhook()
    [ids] = await walk(api, "/v1/webhooks")
    first = (await api("GET", "/v1/webhooks", params={"limit": "2", "before": ids[4]})).json
    assert [entry["id"] for entry in first["data"]] == ids[2:4]
    assert (first["has_more"], first["next"]) == (True, ids[2])
    rest = (await api("GET", "/v1/webhooks", params={"limit": "2", "before": ids[2]})).json
    assert ([entry["id"] for entry in rest["data"]], rest["next"]) == (ids[:2], None)


async def test_a_cursor_outlives_the_entry_it_names(api: Api) -> None:
    for _ in range(3):
        await api.webhook()
    [ids] = await walk(api, "/v1/webhooks")
    await api("DELETE", f"/v1/webhooks/{ids[0]}")
    rest = (await api("GET", "/v1/webhooks", params={"after": ids[0]})).json
    assert [entry["id"] for entry in rest["data"]] == ids[1:]


@pytest.mark.parametrize("way", ["after", "before"])
async def test_a_cursor_of_another_list_is_a_mistake(api: Api, way: str) -> None:
    check_problem(await api("GET", f"/v1/webhooks?{way}=evt_1"), 422, "invalid_request", [way])


@pytest.mark.parametrize("path", ["/v1/webhooks", "/v1/events"])
@pytest.mark.parametrize(
    ("query", "fields"),
    [
        ("limit=0", ["limit"]),
        ("limit=101", ["limit"]),
        ("limit=ten", ["limit"]),
        ("limit=", ["limit"]),
        ("limit=1&limit=2", ["limit"]),
        ("after=%00", ["after"]),
        ("after=", ["after"]),
        ("before=x%20y", ["before"]),
        ("after=wh_1&before=wh_2", ["before"]),
        ("offset=10", ["offset"]),
        ("page=2&sort=url", ["page", "sort"]),
    ],
)
async def test_a_mistake_in_a_query_is_named(api: Api, path: str, query: str, fields: list[str]) -> None:
    check_problem(await api("GET", f"{path}?{query}"), 422, "invalid_request", fields)


# ── events ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_event_keeps_its_data_as_written(api: Api) -> None:
    text = '{ "b": 1.0,  "a": [1e2, "\\u00e9é"], "10": null }'
    answer = await api("POST", "/v1/events", b'{"type": "email.sent", "data": %b }' % text.encode())
    assert answer.status == 201
    made = answer.json
    assert text in answer.text
    assert answer.headers["Location"] == f"/v1/events/{made['id']}"
    assert made["id"].startswith("evt_")
    assert (made["type"], made["status"], made["reason"]) == ("email.sent", "accepted", None)
    again = await api("GET", f"/v1/events/{made['id']}")
    assert (again.status, again.text) == (200, answer.text)


async def test_an_event_lands_in_the_outbox_of_its_account(api: Api, pool: asyncpg.Pool) -> None:
    made = (await api("POST", "/v1/events", {"type": "any.type_at_all", "data": {}})).json
    row = await pool.fetchrow("SELECT account, id, type, data FROM dispatcher.outbox")
    assert tuple(row) == ("acme", made["id"], "any.type_at_all", "{}")


async def test_a_repeated_key_returns_the_first_event(api: Api, pool: asyncpg.Pool) -> None:
    headers, body = {"Idempotency-Key": "open-17"}, {"type": "email.opened", "data": {"n": 1}}
    first = await api("POST", "/v1/events", body, headers=headers)
    await pool.execute("UPDATE dispatcher.outbox SET created_at = '2020-02-02T02:02:02Z'")
    second = await api("POST", "/v1/events", body, headers=headers)
    assert (first.status, second.status) == (201, 200)
    assert second.json == {**first.json, "created_at": "2020-02-02T02:02:02Z"}
    check_problem(
        await api("POST", "/v1/events", {**body, "data": {"n": 2}}, headers=headers), 409, "idempotency_conflict"
    )
    others = await api("POST", "/v1/events", body, headers=headers, key=api.keys["rival"])
    assert (others.status, others.json["id"] == first.json["id"]) == (201, False)
    assert await pool.fetchval("SELECT count(*) FROM dispatcher.outbox") == 2


async def test_a_key_sent_twice_at_once_makes_one_event(api: Api) -> None:
    headers, body = {"Idempotency-Key": "k"}, {"type": "email.opened", "data": {}}
    answers = await asyncio.gather(*(api("POST", "/v1/events", body, headers=headers) for _ in range(4)))
    assert sorted(answer.status for answer in answers) == [200, 200, 200, 201]
    assert len({answer.json["id"] for answer in answers}) == 1


def sent(data: str) -> str:
    return f'{{"type": "email.sent", "data": {data}}}'


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (sent('{"x": NaN}'), ["data"]),
        (sent('{"x": -Infinity}'), ["data"]),
        (sent('{"x": "\\ud800"}'), ["data"]),
        (sent('{"x": 1, "x": 2}'), ["data"]),
        (sent('{"x": 9007199254740992}'), ["data"]),
        (sent('{"x": %s}' % ("9" * 5000)), ["data"]),
        (sent('{"x": 1e999}'), ["data"]),
        (sent("[]"), ["data"]),
        (sent("null"), ["data"]),
        (sent(nested(65)), ["data"]),
        (sent(nested(50_000)), ["data"]),
        (sent('{"x": "%s"}' % ("x" * 262_144)), ["data"]),
        ('{"type": "email.sent"}', ["data"]),
        ('{"data": {}}', ["type"]),
        ('{"type": "Email Sent", "data": {}}', ["type"]),
        ('{"type": "%s", "data": {}}' % ("a." * 64 + "b"), ["type"]),
        ('{"type": 5, "data": {}, "account": "rival"}', ["account", "type"]),
        ('{"type": "email.sent", "type": "email.opened", "data": {}}', ["type"]),
        ('{"type": "email.sent", "data": {}, "\\ud800": 1}', ["\\ud800"]),
        ("[1, 2]", [""]),
        ('"text"', [""]),
        ("null", [""]),
    ],
)
async def test_an_event_that_cannot_be_sent_is_refused(api: Api, body: str, fields: list[str]) -> None:
    check_problem(await api("POST", "/v1/events", body.encode()), 422, "invalid_request", fields)


async def test_the_deepest_data_that_can_be_sent_is_accepted(api: Api) -> None:
    assert (await api("POST", "/v1/events", sent(nested(64)).encode())).status == 201


@pytest.mark.parametrize("key", ["", "x" * 256, "ümlaut"])
async def test_an_idempotency_key_has_bounds(api: Api, key: str) -> None:
    answer = await api("POST", "/v1/events", {"type": "a.b", "data": {}}, headers={"Idempotency-Key": key})
    check_problem(answer, 422, "invalid_request", ["Idempotency-Key"])


async def test_while_a_large_event_is_rendered_others_are_answered(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(kind: str, data: bytes) -> None:
        begun.set()
        assert go_on.wait(10), "nobody else was answered"
        check_data(kind, data)

    monkeypatch.setattr("dispatcher.web.events.check_data", slow)
    large = [
        asyncio.create_task(api("POST", "/v1/events", {"type": "email.sent", "data": {"x": "y" * size}}))
        for size in (20_000, 300_000)
    ]
    while not begun.is_set():
        await asyncio.sleep(0.01)
    assert (await api("GET", "/v1/event-types")).status == 200
    go_on.set()
    taken, refused = await asyncio.gather(*large)
    assert taken.status == 201
    check_problem(refused, 422, "invalid_request", ["data"])


async def test_events_are_listed_by_type_newest_first(api: Api) -> None:
    made = [(await api("POST", "/v1/events", {"type": f"t.{n % 2}", "data": {"n": n}})).json["id"] for n in range(5)]
    newest = sorted(made, reverse=True)
    assert await walk(api, "/v1/events", limit="2") == [newest[:2], newest[2:4], newest[4:]]
    odd = chain.from_iterable(await walk(api, "/v1/events", limit="1", type="t.1"))
    assert list(odd) == sorted(made[1::2], reverse=True)
    assert await walk(api, "/v1/events", type="t.unknown") == [[]]
    check_problem(await api("GET", "/v1/events", params={"type": "*"}), 422, "invalid_request", ["type"])


async def test_a_discarded_event_says_why(api: Api, pool: asyncpg.Pool) -> None:
    await pool.execute("INSERT INTO dispatcher.outbox (account, id, type, data) VALUES ('acme', 'evt_1', 'X', '[]')")
    await pool.execute(
        "INSERT INTO dispatcher.discarded_event (event_seq, reason) SELECT seq, 'data is not a JSON object'"
        " FROM dispatcher.outbox"
    )
    expected = ("discarded", "data is not a JSON object", [])
    for event in ((await api("GET", "/v1/events/evt_1")).json, (await api("GET", "/v1/events")).json["data"][0]):
        assert (event["status"], event["reason"], event["data"]) == expected


async def test_the_catalogue_is_told_whole(api: Api) -> None:
    document = (await api("GET", "/v1/event-types")).json
    assert [entry["name"] for entry in document["data"]] == list(api.parts.catalogue.names())
    assert len(document["data"]) == 13
    assert all(set(entry) == {"name", "description", "when", "schema", "sample"} for entry in document["data"])
    assert (document["has_more"], document["next"]) == (False, None)


# ── what every call has in common ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"not json", b'{"url": "https://example.com/",}', b'{"url" 1}', b"{} {}", b'{"a": "tab\there"}',
     b'{"url": "\xff"}', b"\xef\xbb\xbf{}", b"{1: 2}", b'{"a": 01}', b'{"a": +1}', b"[", b"[" * 50],
)  # fmt: skip
async def test_what_is_not_json_is_400(api: Api, body: bytes) -> None:
    check_problem(await api("POST", "/v1/webhooks", body), 400, "invalid_json")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""])
async def test_another_content_type_is_415(api: Api, content_type: str) -> None:
    answer = await api("POST", "/v1/webhooks", b"{}", headers={"Content-Type": content_type})
    check_problem(answer, 415, "unsupported_media_type")


async def test_a_charset_beside_the_content_type_is_no_matter(api: Api) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert (await api("POST", "/v1/webhooks", GUIDE, headers=headers)).status == 201


async def test_a_body_over_one_mebibyte_is_413(api: Api) -> None:
    large = json.dumps({"type": "a.b", "data": {"x": "x" * (5 << 20)}}).encode()
    check_problem(await api("POST", "/v1/events", large), 413, "too_large")
    packed = await api("POST", "/v1/events", gzip.compress(large), headers={"Content-Encoding": "gzip"})
    check_problem(packed, 413, "too_large")


async def test_a_body_that_cannot_be_unpacked_is_400(api: Api) -> None:
    answer = await api("POST", "/v1/events", b"plain", headers={"Content-Encoding": "gzip"})
    check_problem(answer, 400, "incomplete_body")
    assert answer.headers["Connection"] == "close"


async def test_a_body_that_does_not_arrive_is_408(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.01)
    answered = asyncio.Event()

    async def drip() -> Any:
        yield b"{"
        await answered.wait()

    headers = {"Authorization": f"Bearer {api.keys['acme']}", "Content-Type": "application/json"}
    async with api._client.post("/v1/events", data=drip(), headers=headers) as response:
        answered.set()
        assert (response.status, (await response.json(content_type=None))["code"]) == (408, "body_timeout")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/v1/webhooks", {"GET", "HEAD", "POST"}),
        ("DELETE", "/v1/events", {"GET", "HEAD", "POST"}),
        ("POST", f"/v1/webhooks/{NOWHERE}", {"GET", "HEAD", "PATCH", "DELETE"}),
        ("GET", f"/v1/webhooks/{NOWHERE}/pause", {"POST"}),
        ("POST", "/v1/event-types", {"GET", "HEAD"}),
    ],
)
async def test_a_method_that_is_not_there_is_405_with_those_that_are(
    api: Api, method: str, path: str, allow: set[str]
) -> None:
    answer = await api(method, path)
    check_problem(answer, 405, "method_not_allowed")
    assert set(answer.headers["Allow"].split(",")) == allow
    assert all(other in answer.json["detail"] for other in allow)


async def test_a_call_that_takes_nothing_refuses_what_it_is_given(api: Api) -> None:
    path = f"/v1/webhooks/{(await api.webhook())['id']}"
    for call in ("pause", "resume"):
        answer = await api("POST", f"{path}/{call}", {"for": "1h"})
        check_problem(answer, 422, "invalid_request", ["for"])
        assert (await api("POST", f"{path}/{call}", {})).status == 200


@pytest.mark.parametrize(
    "path",
    ["/", "/v1", "/v1/", "/v2/webhooks", "/v1/webhook", "/v1/webhooks/", "/v1/webhooks/%00", "/v1/webhooks/a%2Fb",
     f"/v1/webhooks/{'x' * 65}", f"/v1/webhooks/{NOWHERE}", "/v1/webhooks/..%2fevents",
     f"/v1/webhooks/{NOWHERE}/secret", "/v1/events/evt_none", "/v1/webhooks/%F0%9F%8E%89"],
)  # fmt: skip
async def test_a_path_that_leads_nowhere_is_404(api: Api, path: str) -> None:
    check_problem(await api("GET", path), 404, "not_found")


CALLS = [
    ("POST", "/v1/webhooks/{webhook}/rotate-secret", None),
    ("POST", "/v1/webhooks", GUIDE),
    ("GET", "/v1/webhooks", None),
    ("GET", "/v1/webhooks/{webhook}", None),
    ("PATCH", "/v1/webhooks/{webhook}", {"description": "mine now"}),
    ("DELETE", "/v1/webhooks/{webhook}", None),
    ("POST", "/v1/webhooks/{webhook}/pause", None),
    ("POST", "/v1/webhooks/{webhook}/resume", None),
    ("GET", "/v1/webhooks/{webhook}/secret", None),
    ("POST", "/v1/events", {"type": "email.sent", "data": {}}),
    ("GET", "/v1/events", None),
    ("GET", "/v1/events/{event}", None),
    ("GET", "/v1/event-types", None),
]


async def test_these_are_all_the_calls(api: Api) -> None:
    from dispatcher.web.events import Events
    from dispatcher.web.webhooks import Webhooks

    routes = {(r.method, r.path) for r in [*Webhooks(api.parts).routes(), *Events(api.parts).routes()]}
    named = {(m, p.removeprefix("/v1").replace("{webhook}", "{}").replace("{event}", "{}")) for m, p, _ in CALLS}
    assert {(method, path.replace("{id:[A-Za-z0-9_-]{1,64}}", "{}")) for method, path in routes} == named


async def test_no_call_answers_a_stranger(api: Api) -> None:
    made = await api.webhook()
    event = (await api("POST", "/v1/events", {"type": "email.sent", "data": {}})).json
    record, revoked = await api.parts.accounts.create_key("acme")
    await api.parts.accounts.revoke_key(record.id)
    for key in ("", "tp_live_wrong", "tp_live_" + "x" * 33, api.keys["acme"][:-1], api.keys["acme"].upper(), revoked):
        for method, path, body in CALLS:
            answer = await api(method, path.format(webhook=made["id"], event=event["id"]), body, key=key)
            check_problem(answer, 401, "unauthorized")
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert (await api("GET", f"/v1/webhooks/{made['id']}")).json["status"] == "active"


async def test_what_belongs_to_another_account_is_404_or_not_in_the_list(api: Api) -> None:
    made = await api.webhook()
    event = (await api("POST", "/v1/events", {"type": "email.sent", "data": {}})).json
    for method, path, body in CALLS:
        if "{" in path:
            theirs = path.format(webhook=made["id"], event=event["id"])
            check_problem(await api(method, theirs, body, key=api.keys["rival"]), 404, "not_found")
    for path in ("/v1/webhooks", "/v1/events"):
        assert (await api("GET", path, key=api.keys["rival"])).json["data"] == []
    assert (await api("GET", f"/v1/webhooks/{made['id']}")).json == {k: v for k, v in made.items() if k != "secret"}


async def test_calls_without_parameters_refuse_them(api: Api) -> None:
    for method, path, body in CALLS:
        if (method, path) not in {("GET", "/v1/webhooks"), ("GET", "/v1/events")}:
            answer = await api(method, f"{path.format(webhook=NOWHERE, event='evt_1')}?force=1", body)
            check_problem(answer, 422, "invalid_request", ["force"])


async def test_every_answer_carries_the_same_head(api: Api) -> None:
    for path in ("/v1/webhooks", "/v1/webhooks/none", "/nowhere"):
        answer = await api("GET", path, headers={"X-Request-Id": "trace-1"})
        assert answer.headers["X-Request-Id"] == "trace-1"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert "Server" not in answer.headers


@pytest.mark.parametrize("given", ["two words", "x" * 65, "<script>", ""])
async def test_a_request_id_that_is_none_is_replaced(api: Api, given: str) -> None:
    answer = await api("GET", "/v1/webhooks", headers={"X-Request-Id": given})
    assert answer.headers["X-Request-Id"].startswith("req_")


async def test_one_request_id_is_in_the_head_in_the_problem_and_in_every_line_of_the_log(
    api: Api, log_stream: io.StringIO
) -> None:
    start_logging(LogSettings(format="json"), log_stream)
    answer = await api("GET", "/v1/webhooks/none?x=\n", headers={"X-Request-Id": "trace-3"})
    assert answer.json["request_id"] == answer.headers["X-Request-Id"] == "trace-3"
    lines = [json.loads(line) for line in log_stream.getvalue().splitlines()]
    [line] = [line for line in lines if line["event"] == "request"]
    assert (line["request_id"], line["path"], line["status"]) == ("trace-3", "/v1/webhooks/none", answer.status)
    assert line["level"] == "info"
    await api("GET", "/v1/webhooks")
    assert len(log_stream.getvalue().splitlines()) == len(lines), "what succeeds is a matter of debug"


async def test_trace_of_an_event_that_is_emitted_over_http_is_the_callers(api: Api, database: str) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    found = []
    for given in (trace, "nonsense", None):
        headers = {"traceparent": given} if given else {}
        made = await api("POST", "/v1/events", {"type": "email.sent", "data": {}}, headers=headers)
        assert made.status == 201
        connection = await asyncpg.connect(database)
        found.append(
            await connection.fetchval("SELECT traceparent FROM dispatcher.outbox WHERE id = $1", made.json["id"])
        )
        await connection.close()
    assert found == [trace, "", ""]


async def test_a_fault_of_ours_tells_nothing_but_its_request_id(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("password=hunter2")

    monkeypatch.setattr(api.parts.endpoints, "get", fail, raising=False)
    answer = await api("GET", f"/v1/webhooks/{NOWHERE}", headers={"X-Request-Id": "trace-2"})
    check_problem(answer, 500, "internal_error")
    assert "trace-2" in answer.json["detail"]
    assert "hunter2" not in answer.text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConnectionRefusedError(111, "refused"), 503),
        (TimeoutError(), 503),
        (asyncpg.CannotConnectNowError("starting up"), 503),
        (asyncpg.AdminShutdownError("terminating"), 503),
        (asyncpg.TooManyConnectionsError("too many"), 503),
        (asyncpg.DiskFullError("full"), 503),
        (asyncpg.ReadOnlySQLTransactionError("standby"), 503),
        (asyncpg.InterfaceError("connection is closed"), 503),
        (asyncpg.UndefinedTableError("no such table"), 500),
        (asyncpg.exceptions.DataError("bad argument"), 500),
    ],
)
async def test_a_database_that_is_away_is_503_and_a_mistake_of_ours_is_not(
    api: Api, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(api.parts.events, "get", fail, raising=False)
    answer = await api("GET", "/v1/events/evt_1")
    check_problem(answer, status, "unavailable" if status == 503 else "internal_error")
    assert ("Retry-After" in answer.headers) == (status == 503)


async def test_a_database_that_went_away_comes_back(api: Api, pool: asyncpg.Pool) -> None:
    await api.webhook()
    await pool.fetch("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                     " AND datname = current_database()")  # fmt: skip
    answers = [await api("GET", "/v1/webhooks") for _ in range(8)]
    assert {answer.status for answer in answers} <= {200, 503}
    assert answers[-1].status == 200
