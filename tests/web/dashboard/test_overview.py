"""The overview, the log of a webhook, and what keeps both up to date."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from dispatcher.model import EndpointStatus
from dispatcher.snapshot import Snapshot
from dispatcher.store.overview import OverviewStore, WebhookState
from dispatcher.web.dashboard import live
from dispatcher.web.dashboard.advice import explained, trouble_of
from dispatcher.web.dashboard.rendering import clock, duration, milliseconds, percent, relative

if TYPE_CHECKING:
    from tests.web.dashboard.conftest import Browser, House, Seen

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


# -- the overview


async def test_an_empty_account_is_shown_what_to_do(browser: Browser) -> None:
    words = (await browser.get("/")).words
    assert "Add your first webhook" in words
    assert "Nothing delivered lately" in words


async def test_when_all_is_well_it_says_so(house: House, browser: Browser) -> None:
    webhook = await house.webhook()
    for _ in range(3):
        await house.attempt(webhook["id"], await house.event("email.sent"), "delivered")
    words = (await browser.get("/")).words
    assert "Everything is flowing" in words
    assert "Success rate 100%" in words
    assert words.count("email. sent") == 3


async def test_the_figures_are_those_of_the_log(house: House, browser: Browser) -> None:
    webhook = await house.webhook()
    for state in ("delivered", "delivered", "delivered", "exhausted"):
        await house.attempt(webhook["id"], await house.event(), state)
    await house.attempt(webhook["id"], await house.event(), "retrying")
    await house.pending(webhook["id"], await house.event())
    words = (await browser.get("/")).words
    assert "Success rate 75.0% 1 failed" in words
    assert "Waiting 2 deliveries" in words
    assert "1 retried" in words
    assert "p95 12 ms" in words


async def test_what_is_sent_again_has_not_waited_since_its_event_was_written(house: House, browser: Browser) -> None:
    webhook = await house.webhook()
    await house.pending(webhook["id"], await house.event())
    await house.db.execute("UPDATE dispatcher.pending SET event_at = now() - interval '9 days'")
    assert "Behind since" in (await browser.get("/")).words
    await house.db.execute("UPDATE dispatcher.pending SET generation = 1")
    for path in ("/", f"/webhooks/{webhook['id']}"):
        words = (await browser.get(path)).words
        assert "Behind" not in words
        assert "all of them sent again" in words


async def test_what_is_stuck_stands_first_with_since_when_why_and_what_to_do(house: House, browser: Browser) -> None:
    await house.webhook(url="https://example.com/fine")
    paused = await house.webhook(url="https://example.com/paused")
    failing = await house.webhook(url="https://example.com/failing")
    await browser.post(f"/webhooks/{paused['id']}/pause")
    await house.db.execute(
        "INSERT INTO dispatcher.endpoint_health (endpoint_id, failing_since, last_error)"
        " SELECT id, now() - interval '2 h', '503' FROM dispatcher.endpoint WHERE public_id = $1",
        failing["id"],
    )
    words = (await browser.get("/")).words
    assert "2 things need attention" in words
    first, second = words.index("/failing"), words.index("/paused")
    assert first < second
    assert "2 h ago" in words
    assert "It answers 503: its handler fails. No attempt has succeeded since." in words
    assert "replay what was given up" in words


@pytest.mark.parametrize(
    ("heartbeat", "snapshot", "says"),
    [
        (None, Snapshot(), "No dispatcher is delivering"),
        (timedelta(minutes=5), Snapshot(role="active"), "No dispatcher is delivering"),
        (timedelta(0), Snapshot(role="active", outbox_lag_s=120.0), "lags behind"),
        (timedelta(0), Snapshot(role="active"), "Everything is flowing"),
    ],
)
async def test_a_standby_says_how_the_active_one_fares(
    house: House, browser: Browser, heartbeat: timedelta | None, snapshot: Snapshot, says: str
) -> None:
    house.parts.snapshot = Snapshot
    await house.webhook()
    if heartbeat is not None:
        await house.db.execute(
            "INSERT INTO dispatcher.instance (id, host, pid, role, version, started_at, heartbeat_at, snapshot)"
            " VALUES ('a', 'h', 1, 'active', '0', now(), now() - $1::interval, $2)",
            heartbeat,
            msgspec.json.encode(snapshot).decode(),
        )
    assert says in (await browser.get("/")).words


async def test_where_there_is_too_much_the_figures_say_what_they_cover(house: House) -> None:
    """A busy webhook gets what the quiet ones leave of the rows, and decides where all of it begins."""
    store = OverviewStore(house.db, traffic_rows=100)
    busy, quiet = await house.webhook(), await house.webhook()
    event = await house.event()
    insert = """INSERT INTO dispatcher.attempt
                    (at, event_seq, event_xid, endpoint_id, generation, attempt, state, result, status, duration_us)
                SELECT now() - n * interval '1 second', $2, $3, e.id, 0, 1, 'delivered', '2xx', 200, 1000
                FROM dispatcher.endpoint e, generate_series(1, $4) n WHERE e.public_id = $1"""
    await house.db.execute(insert, busy["id"], event["seq"], event["xid"], 500)
    await house.db.execute(insert, quiet["id"], event["seq"], event["xid"], 5)
    now = datetime.now(UTC)
    account_id = await house.db.fetchval("SELECT account_id FROM dispatcher.endpoint LIMIT 1")
    traffic = await store.traffic(account_id, now - timedelta(hours=1), now)
    assert traffic.is_cut
    assert traffic.whole.delivered == 95 + 5
    assert timedelta(seconds=90) < now - traffic.whole.at < timedelta(seconds=120)
    assert traffic.length == timedelta(seconds=2)
    assert sum(one.delivered for one in traffic.slices) == traffic.whole.delivered
    whole = await OverviewStore(house.db).traffic(account_id, now - timedelta(hours=1), now)
    assert (whole.is_cut, whole.whole.delivered, len(whole.slices)) == (False, 505, 31)


async def test_what_waits_is_counted_up_to_a_bound(house: House) -> None:
    webhook, quiet = await house.webhook(), await house.webhook()
    for _ in range(80):
        await house.pending(webhook["id"], await house.event())
    await house.pending(quiet["id"], await house.event())
    account_id = await house.db.fetchval("SELECT account_id FROM dispatcher.endpoint LIMIT 1")
    for rows, expected in ((10, (20, True)), (60, (59, True)), (1000, (80, False))):
        store = OverviewStore(house.db, waiting_rows=rows)
        states = {state.id: (state.waiting, state.is_cut) for state in await store.webhooks(account_id)}
        assert states == {webhook["id"]: expected, quiet["id"]: (1, False)}


# -- the log


@pytest.fixture
async def log(house: House) -> dict[str, Any]:
    """A webhook with a delivery in each state, and thirty more that were delivered."""
    webhook = await house.webhook()
    ids = {}
    for n in range(30):
        ids[f"old {n}"] = await house.attempt(webhook["id"], await house.event("email.opened"), "delivered")
    for state in ("delivered", "exhausted", "discarded", "retrying"):
        ids[state] = await house.attempt(webhook["id"], await house.event(f"email.{state}"), state)
    event = await house.event("email.pending")
    await house.pending(webhook["id"], event)
    return {"path": f"/webhooks/{webhook['id']}/deliveries", "ids": ids, "event": event}


def types_of(text: str) -> list[str]:
    found = re.findall(r'<a href="/deliveries/[^"]+">(.*?)</a>', text)
    return [name.replace("<wbr>", "") for name in found]


async def test_retrying_is_told_from_exhausted(browser: Browser, log: dict[str, Any]) -> None:
    words = (await browser.get(log["path"])).words
    assert re.search(r"retrying email\. retrying .*? 1 attempt failed, next in 5\d s", words)
    assert re.search(r"exhausted email\. exhausted .*? given up after 1 attempt", words)
    assert re.search(r"pending email\. pending .*? queued", words)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("status=retrying", ["email.retrying"]),
        ("status=exhausted", ["email.exhausted"]),
        ("status=pending", ["email.pending"]),
        ("status_class=5xx", ["email.retrying", "email.discarded", "email.exhausted"]),
        ("type=email.discarded", ["email.discarded"]),
        ("status=delivered&type=email.delivered&since=&until=&id=", ["email.delivered"]),
        ("since=2999-01-01T00:00", []),
        ("until=2000-01-01T00:00", []),
        ("id=evt_unknown", []),
    ],
)
async def test_filters_stand_in_the_address(
    browser: Browser, log: dict[str, Any], query: str, expected: list[str]
) -> None:
    page = await led_on(browser, f"{log['path']}?{query}")
    assert page.status == 200
    assert types_of(page.text) == expected
    assert expected or "No delivery matches" in page.words


async def led_on(browser: Browser, path: str) -> Seen:
    """The page, at the address that it has for sharing."""
    page = await browser.get(path)
    return await browser.get(page.location) if page.status == 303 else page


async def test_an_address_means_the_same_in_every_zone_and_holds_no_empty_filters(
    browser: Browser, log: dict[str, Any]
) -> None:
    query = "status=&since=2026-07-01T12:30&type=email.delivered&note=saved"
    browser.client.session.cookie_jar.update_cookies({"dispatcher_zone": "Europe/Berlin"})
    page = await browser.get(f"{log['path']}?{query}")
    assert page.location == f"{log['path']}?since=2026-07-01T10:30:00Z&type=email.delivered"
    assert 'value="2026-07-01T12:30"' in (await browser.get(page.location)).text


async def test_an_event_s_id_finds_its_delivery_and_a_delivery_s_id_leads_to_it(
    browser: Browser, log: dict[str, Any]
) -> None:
    page = await browser.get(f"{log['path']}?id={log['event']['id']}")
    assert types_of(page.text) == ["email.pending"]
    delivery_id = log["ids"]["exhausted"]
    assert (await browser.get(f"{log['path']}?id={delivery_id}")).location == f"/deliveries/{delivery_id}"


async def test_pages_turn_forth_and_back_with_the_filters(browser: Browser, log: dict[str, Any]) -> None:
    query = "?status_class=2xx"
    first = await browser.get(log["path"] + query)
    older = re.search(r'rel="next" href="([^"]+)"', first.text)
    assert older
    second = await browser.get(older[1].replace("&amp;", "&"))
    assert (len(types_of(first.text)), len(types_of(second.text))) == (30, 1)
    assert "status_class=2xx" in older[1]
    newer = re.search(r'rel="prev" href="([^"]+)"', second.text)
    assert newer
    back = await browser.get(newer[1].replace("&amp;", "&"))
    assert types_of(back.text) == types_of(first.text)


@pytest.mark.parametrize(
    ("query", "field"),
    [("status=lost", "status"), ("type=Bad", "type"), ("since=soon", "since"), ("until=soon", "until"),
     ("status_class=9xx", "status_class"), ("since=2026-02-02T00:00&until=2026-01-01T00:00", "until")],
)  # fmt: skip
async def test_a_filter_that_makes_no_sense_says_so_beside_it(
    browser: Browser, log: dict[str, Any], query: str, field: str
) -> None:
    page = await led_on(browser, f"{log['path']}?{query}")
    assert page.status == 422
    assert re.findall(r'id="(\w+)-error"', page.text) == [field]


@pytest.mark.parametrize("query", ["after=%00", "after=a&before=b", "before=" + "x" * 500])
async def test_a_cursor_that_is_none_begins_at_the_top(browser: Browser, log: dict[str, Any], query: str) -> None:
    assert len(types_of((await browser.get(f"{log['path']}?{query}")).text)) == 30


# -- live


async def read_until(content: Any, wanted: bytes) -> bytes:
    seen = b""
    async with asyncio.timeout(20):
        while wanted not in seen:
            seen += await content.readany()
    return seen


async def test_an_open_page_is_told_of_a_change(
    house: House, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "PULSE_S", 0.01)
    webhook = await house.webhook()
    event = await house.event()
    async with browser.client.get("/live") as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        await read_until(stream.content, b"looking")
        for change in (
            lambda: house.attempt(webhook["id"], event, "delivered"),
            house.event,
            lambda: browser.post(f"/webhooks/{webhook['id']}/pause"),
        ):
            await change()
            await read_until(stream.content, b"event: change")


async def test_an_open_page_is_told_that_the_database_is_away_and_when_it_is_back(
    house: House, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "PULSE_S", 0.01)
    monkeypatch.setattr(live, "TROUBLE_S", 0.01)
    pulse, asked = OverviewStore.pulse, 0

    async def away(*_: object) -> str:
        nonlocal asked
        asked += 1
        raise ConnectionRefusedError

    async with browser.client.get("/live") as stream:
        await read_until(stream.content, b"looking")
        monkeypatch.setattr(OverviewStore, "pulse", away)
        seen = await read_until(stream.content, b"event: away")
        while asked < 5:
            await asyncio.sleep(0.01)
        monkeypatch.setattr(OverviewStore, "pulse", pulse)
        seen += await read_until(stream.content, b"event: change")
    assert seen.count(b"event: away") == 1


async def test_a_page_that_is_opened_behind_another_is_not_shown_what_that_one_was(
    house: House, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "PULSE_S", 0.01)
    look = {live.LOOKING: "again"}
    async with browser.client.get("/live") as stream:
        await read_until(stream.content, b"looking")
        assert "0 active" in (await browser.get("/", **look)).words
    await house.webhook()
    while any(task.get_name() == "dashboard pulse" for task in asyncio.all_tasks()):
        await house.event()  # a change, at which the stream finds that nobody listens
        await asyncio.sleep(0.01)
    async with browser.client.get("/live") as stream:
        await read_until(stream.content, b"looking")
        assert "1 active" in (await browser.get("/", **look)).words


async def test_what_happens_to_others_is_no_change(
    house: House, browser: Browser, rival: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "PULSE_S", 0.01)
    async with rival.client.get("/live") as theirs, browser.client.get("/live") as mine:
        await read_until(theirs.content, b"looking")
        await read_until(mine.content, b"looking")
        webhook = await house.webhook()
        await house.attempt(webhook["id"], await house.event(), "delivered")
        await read_until(mine.content, b"event: change")
        await house.webhook("rival")
        assert (await read_until(theirs.content, b"event: change")).count(b"event: change") == 1


async def test_a_session_that_ends_ends_its_stream(
    house: House, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "HEARTBEAT_S", 0.01)
    async with browser.client.get("/live") as stream:
        await read_until(stream.content, b"heartbeat")
        await house.parts.accounts.revoke_key(house.key_ids["acme"])
        await read_until(stream.content, b"event: over")
        assert await stream.content.read() == b""


async def test_streams_of_an_account_are_bounded(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "ACCOUNT_PAGES_MAX", 1)
    async with browser.client.get("/live") as first:
        await read_until(first.content, b"looking")
        assert (await browser.get("/live")).status == 429


# -- words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 min"), (3599, "59 min"), (3600, "1 h"), (9000, "2 h 30 min"),
     (86399, "23 h 59 min"), (90_000, "1 d 1 h"), (9 * 86400 + 7200, "9 d 2 h"), (11 * 86400 + 7200, "11 d")],
)  # fmt: skip
def test_stretches_of_time(seconds: float, text: str) -> None:
    assert duration(seconds) == text
    assert relative(NOW - timedelta(seconds=seconds), NOW) == ("now" if seconds < 1 else f"{text} ago")


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, "–"), (0, "0%"), (1, "100%"), (0.99999, "99.9%"), (0.0001, "0.1%"), (0.5, "50.0%")],
)
def test_only_what_is_whole_is_a_hundred_percent(share: float | None, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.042, "0.04 ms"), (1.25, "1.2 ms"), (85.4, "85 ms"), (1234, "1.23 s"), (30_000, "30.0 s")],
)
def test_latencies(value: float | None, text: str) -> None:
    assert milliseconds(value) == text


def test_a_moment_is_as_short_as_can_be() -> None:
    times = [NOW - timedelta(minutes=5), NOW - timedelta(days=3), NOW - timedelta(days=300)]
    assert [clock(at, UTC, NOW) for at in times] == ["11:55:00", "26 Feb, 12:00:00", "5 May 2025, 12:00:00"]


STATE = WebhookState(
    id="wh_1", url="https://example.com", description="", events=["*"], status=EndpointStatus.ACTIVE,
    disabled_reason=None, updated_at=NOW, failing_since=None, last_error=None, waiting=0, is_cut=False,
    oldest_at=None, next_at=None,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({}, None),
        ({"failing_since": NOW - timedelta(seconds=5)}, None),
        ({"failing_since": NOW - timedelta(minutes=5), "last_error": "500"}, "Failing"),
        ({"status": EndpointStatus.PAUSED, "oldest_at": NOW - timedelta(days=1)}, "Paused"),
        ({"status": EndpointStatus.DISABLED, "disabled_reason": "x"}, "Disabled"),
        ({"oldest_at": NOW - timedelta(seconds=20)}, None),
        ({"oldest_at": NOW - timedelta(minutes=20)}, "Behind"),
    ],
)
def test_what_counts_as_trouble(changes: dict[str, Any], title: str | None) -> None:
    trouble = trouble_of(msgspec.structs.replace(STATE, **changes), NOW)
    assert (trouble and trouble.title) == title
    if trouble:
        assert all(dataclasses.asdict(trouble)[name] for name in ("title", "reason", "remedy", "since"))


@pytest.mark.parametrize("error", [None, "301", "400", "401", "404", "429", "500", "tls: certificate expired", "²"])
def test_every_failure_is_explained(error: str | None) -> None:
    assert all(explained(error))
