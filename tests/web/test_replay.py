"""Old events for a webhook: chosen, counted, sent once each, and gone on with after a restart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from counter import Desk, open_desk
from house import until

from dispatcher.store import replays
from dispatcher.store.replays import ReplayStore

if TYPE_CHECKING:
    from tests.web.conftest import Api

EVER = "2000-01-01T00:00:00Z"


@pytest.fixture
async def desk(api: Api, pool: Any, database: str) -> AsyncIterator[Desk]:
    async with open_desk(api, pool, database) as desk:
        yield desk


async def ended(desk: Desk, webhook: str, job: dict[str, Any]) -> dict[str, Any]:
    """A replay, once it is over."""

    async def over() -> Any:
        shown = await desk.ask("GET", f"/webhooks/{webhook}/replays/{job['id']}")
        return shown if shown["status"] != "running" else None

    shown: dict[str, Any] = await until(over)
    return shown


async def replay(desk: Desk, webhook: str, status: str, **more: Any) -> dict[str, Any]:
    body = {"since": EVER, "status": status, **more}
    made: dict[str, Any] = await desk.ask("POST", f"/webhooks/{webhook}/replay", body, status=202)
    return made


async def count(desk: Desk, webhook: str, status: str, **more: Any) -> int:
    body = {"since": EVER, "status": status, "dry_run": True, **more}
    found = await desk.ask("POST", f"/webhooks/{webhook}/replay", body)
    assert (found["dry_run"], found["is_lower_bound"]) == (True, False)
    return int(found["count"])


async def test_a_new_webhook_is_filled_from_history(desk: Desk) -> None:
    events = await desk.emit("email.sent", "email.opened", "email.sent")
    await desk.emit("email.sent", account="default")  # somebody else's
    webhook = await desk.webhook(events=["email.sent"])
    await desk.start()
    assert await count(desk, webhook, "missed") == 2
    assert desk.receiver.arrivals == []
    job = await replay(desk, webhook, "missed")
    shown = await ended(desk, webhook, job)
    assert (shown["status"], shown["looked"], shown["queued"], shown["progress"]) == ("done", 3, 2, 1.0)
    found = await desk.settled(webhook, 2)
    assert sorted(a.event_id for a in desk.receiver.arrivals) == sorted([events[0], events[2]])
    assert all(each["redelivery"] for each in found)
    assert await count(desk, webhook, "missed") == 0
    assert await count(desk, webhook, "all") == 2


async def test_failed_are_those_that_were_given_up_and_never_arrived(desk: Desk) -> None:
    webhook = await desk.webhook()
    desk.receiver.answer = lambda arrival: 400 if arrival.headers["X-Trackpost-Event"] == "email.opened" else 200
    await desk.start()
    sent, opened = await desk.emit("email.sent", "email.opened")
    await desk.settled(webhook, 2)
    desk.receiver.answer = lambda arrival: 200
    assert await count(desk, webhook, "failed", types=["email.sent"]) == 0
    assert await count(desk, webhook, "failed", types=["email.opened"]) == 1
    await ended(desk, webhook, await replay(desk, webhook, "failed", types=["email.opened"]))
    await until(lambda: len(desk.receiver.of(opened)) == 2)
    await until(lambda: _delivered(desk, webhook, opened))
    assert len(desk.receiver.of(sent)) == 1
    assert await count(desk, webhook, "failed") == 0


async def _delivered(desk: Desk, webhook: str, event: str) -> bool:
    return bool(await desk.deliveries(webhook, event_id=event, status="delivered"))


async def test_time_bounds_what_is_replayed(desk: Desk) -> None:
    await desk.emit("email.sent")
    webhook = await desk.webhook()
    assert await count(desk, webhook, "all", until="2001-01-01T00:00:00Z") == 0
    assert await count(desk, webhook, "all") == 1


async def test_what_is_on_its_way_is_not_replayed(desk: Desk) -> None:
    webhook = await desk.webhook()
    await desk.ask("POST", f"/webhooks/{webhook}/pause")
    await desk.start()
    await desk.emit("email.sent")
    await until(lambda: desk.deliveries(webhook, status="pending"))
    for status in ("all", "failed", "missed"):
        assert await count(desk, webhook, status) == 0


async def test_what_may_still_be_in_memory_was_not_missed(desk: Desk) -> None:
    webhook = await desk.webhook()
    await desk.emit("email.sent")  # no engine runs: nobody knows of it yet
    assert await count(desk, webhook, "missed") == 0
    await desk.app.execute("UPDATE dispatcher.outbox SET written_at = written_at - interval '20 seconds'")
    assert await count(desk, webhook, "missed") == 1


async def test_a_replay_survives_a_restart_and_sends_each_event_once(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = [event for _ in range(12) for event in await desk.emit("email.sent")]
    webhook = await desk.webhook()
    job = await replay(desk, webhook, "missed")
    first = ReplayStore(desk.app, step_events=5)  # a step, and then the engine that took it is gone
    assert await first.step(job["id"])
    halfway = await desk.ask("GET", f"/webhooks/{webhook}/replays/{job['id']}")
    assert (halfway["status"], halfway["queued"]) == ("running", 5)
    assert 0.0 < halfway["progress"] < 1.0
    await desk.start()
    assert (await ended(desk, webhook, job))["queued"] == 12
    await desk.settled(webhook, 12)
    assert sorted(arrival.event_id for arrival in desk.receiver.arrivals) == sorted(events)


async def test_a_crash_in_the_midst_of_a_replay_loses_nothing(desk: Desk) -> None:
    events = {event for _ in range(40) for event in await desk.emit("email.sent")}
    webhook = await desk.webhook()
    running = await desk.start()
    await replay(desk, webhook, "missed")
    await until(lambda: desk.receiver.arrivals)
    await desk.house.crash(running)
    await desk.start()
    await until(lambda: {arrival.event_id for arrival in desk.receiver.arrivals} == events)
    await desk.settled(webhook, 40)


async def test_no_more_waits_at_a_webhook_than_a_step_makes(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "HELD_MAX", 3)
    for _ in range(9):
        await desk.emit("email.sent")
    webhook = await desk.webhook()
    job = await replay(desk, webhook, "missed")
    store = ReplayStore(desk.app, step_events=3)
    assert [await store.step(job["id"]) for _ in range(3)] == [True, False, False]
    assert await desk.house.pending() == 3


async def test_live_events_do_not_wait_behind_a_replay(desk: Desk) -> None:
    for _ in range(30):
        await desk.emit("email.sent")
    webhook = await desk.webhook(max_concurrency=1)
    await desk.start()
    gate = asyncio.Event()

    async def answer() -> int:
        await gate.wait()
        return 200

    desk.receiver.answer = lambda arrival: answer()
    await replay(desk, webhook, "missed")
    await until(lambda: len(desk.receiver.arrivals) == 1)
    [live] = await desk.emit("email.opened")
    key = await desk.key(webhook)
    deliverer = desk.house.engines[0].engine.deliverer
    await until(lambda: any(_event_of(entry) == live for entry in deliverer.subscribers[key].lane.todo))
    assert not await desk.app.fetchval(
        "SELECT count(*) FROM dispatcher.pending p JOIN dispatcher.outbox o ON o.seq = p.event_seq WHERE o.id = $1",
        live,
    )
    gate.set()
    await desk.settled(webhook, 31)


def _event_of(entry: Any) -> str:
    return str(getattr(entry, "item", entry).event.payload.event_id)


async def test_a_disabled_webhook_is_not_replayed_to_and_ends_what_was_begun(desk: Desk) -> None:
    await desk.emit("email.sent")
    webhook = await desk.webhook()
    job = await replay(desk, webhook, "missed")
    await desk.app.execute("UPDATE dispatcher.endpoint SET status = 'disabled', disabled_reason = 'x'")
    await desk.start()
    shown = await ended(desk, webhook, job)
    assert (shown["status"], shown["reason"]) == ("cancelled", "the webhook was disabled")
    refused = await desk.api("POST", f"/v1/webhooks/{webhook}/replay", {"since": EVER, "status": "all"})
    assert (refused.status, refused.json["code"]) == (409, "webhook_disabled")


async def test_replays_of_one_webhook_are_bounded(desk: Desk) -> None:
    webhook = await desk.webhook()
    for _ in range(replays.RUNNING_MAX):
        await replay(desk, webhook, "all")
    refused = await desk.api("POST", f"/v1/webhooks/{webhook}/replay", {"since": EVER, "status": "all"})
    assert (refused.status, refused.json["code"]) == (409, "too_many_replays")


async def test_a_count_that_did_not_see_everything_says_so(desk: Desk) -> None:
    await desk.emit("email.sent", "email.sent", "email.sent")
    webhook = await desk.webhook()
    endpoint = await desk.key(webhook)
    choice = replays.Choice(
        selection=replays.Selection.ALL, since=datetime(2000, 1, 1, tzinfo=UTC), until=datetime.now(UTC)
    )
    found = await ReplayStore(desk.app, count_events=2).preview(endpoint, choice)
    assert found == replays.ReplayPreview(2, 2, False)


async def test_a_step_passes_a_bounded_number_of_events_from_before_its_time(desk: Desk) -> None:
    async def emit(count: int) -> None:
        for _ in range(count):
            await desk.emit("email.sent")
            await desk.app.execute("SELECT pg_sleep(0.002)")  # ids are in order of their milliseconds

    await emit(7)
    since = await desk.app.fetchval("SELECT clock_timestamp()")
    await emit(3)
    webhook = await desk.webhook()
    endpoint = await desk.key(webhook)
    choice = replays.Choice(selection=replays.Selection.MISSED, since=since, until=datetime.now(UTC))
    short = ReplayStore(desk.app, pass_events=2, count_pass_events=8)
    assert await short.preview(endpoint, choice) == replays.ReplayPreview(1, 1, False)
    assert await ReplayStore(desk.app).preview(endpoint, choice) == replays.ReplayPreview(3, 3, True)
    job = await short.create(endpoint, choice)
    assert job is not None
    came = []
    while await short.step(job.id):
        halfway = await short.get(endpoint, job.id)
        assert halfway is not None
        came.append((halfway.looked, halfway.queued))
    done = await short.get(endpoint, job.id)
    assert done is not None
    assert came == [(0, 0), (0, 0), (0, 0), (1, 1), (3, 3)]
    assert (done.status, done.looked, done.queued) == (replays.ReplayStatus.DONE, 3, 3)


async def test_what_makes_no_sense_is_refused(desk: Desk) -> None:
    webhook = await desk.webhook()
    wrong: list[tuple[dict[str, Any], list[str]]] = [
        ({"status": "all"}, ["since"]),
        ({"since": EVER}, ["status"]),
        ({"since": "today", "status": "all"}, ["since"]),
        ({"since": EVER, "status": "lost"}, ["status"]),
        ({"since": "2999-01-01T00:00:00Z", "status": "all"}, ["since"]),
        ({"since": EVER, "until": "1999-01-01T00:00:00Z", "status": "all"}, ["until"]),
        ({"since": EVER, "status": "all", "types": []}, ["types"]),
        ({"since": EVER, "status": "all", "types": ["x"]}, ["types[0]"]),
        ({"since": EVER, "status": "all", "speed": 1}, ["speed"]),
    ]
    for body, fields in wrong:
        answer = await desk.api("POST", f"/v1/webhooks/{webhook}/replay", body)
        assert (answer.status, answer.fields) == (422, fields), body
    for path in (f"/webhooks/{webhook}/replays/rpl_x", "/webhooks/wh_x/replays/rpl_x"):
        assert (await desk.api("GET", f"/v1{path}")).status == 404


async def test_a_replay_is_cancelled_and_what_it_queued_is_taken_back(desk: Desk) -> None:
    for _ in range(8):
        await desk.emit("email.sent")
    webhook = await desk.webhook()
    job = await replay(desk, webhook, "missed")
    store = ReplayStore(desk.app, step_events=3)
    assert await store.step(job["id"])
    place = f"/webhooks/{webhook}/replays/{job['id']}"
    running = await desk.ask("GET", place)
    assert (running["status"], running["queued"]) == ("running", 3)
    assert 0.0 <= running["progress"] < 1.0  # events of one millisecond are looked at in any order
    shown = await desk.ask("DELETE", place)
    assert (shown["status"], shown["reason"], shown["queued"]) == ("cancelled", "cancelled by its owner", 0)
    assert await desk.app.fetchval("SELECT count(*) FROM dispatcher.pending") == 0
    assert await desk.ask("DELETE", place) == shown
    assert not await store.step(job["id"])
    await desk.start()
    live = await desk.emit("email.sent")
    await until(lambda: desk.receiver.arrivals)
    assert [a.event_id for a in desk.receiver.arrivals] == live


@pytest.mark.parametrize(
    ("status", "newest", "reached", "progress"),
    [
        ("running", 1000, 500, 0.445), ("running", 100, 100, 0.99), ("running", 1000, None, 0.0),
        ("running", None, 500, 0.25), ("done", 1000, 500, 1.0), ("cancelled", 1000, 500, 0.445),
    ],
)  # fmt: skip
def test_progress_counts_events_where_it_can_and_time_where_it_cannot(
    status: str, newest: int | None, reached: int | None, progress: float
) -> None:
    hours = [datetime(2025, 1, 15, hour, tzinfo=UTC) for hour in (0, 4, 1)]
    record = replays.ReplayRecord(
        id="rpl_1", selection=replays.Selection.ALL, types=None, since=hours[0], until=hours[1],
        status=replays.ReplayStatus(status), reason=None, reached_at=hours[2], first_seq=100, reached_seq=reached,
        newest_seq=newest, looked=0, queued=0, created_at=hours[1], finished_at=None,
    )  # fmt: skip
    assert record.progress == progress


async def test_what_a_finished_replay_still_has_waiting_can_be_taken_back(desk: Desk) -> None:
    await desk.emit("email.sent", "email.sent")
    webhook = await desk.webhook()
    await desk.ask("POST", f"/webhooks/{webhook}/pause")
    await desk.start()
    done = await ended(desk, webhook, await replay(desk, webhook, "missed"))
    assert (done["status"], done["queued"]) == ("done", 2)
    shown = await desk.ask("DELETE", f"/webhooks/{webhook}/replays/{done['id']}")
    assert (shown["status"], shown["queued"]) == ("cancelled", 0)
    assert await desk.deliveries(webhook) == []


async def test_a_replay_of_which_everything_was_sent_stays_as_it_is(desk: Desk) -> None:
    await desk.emit("email.sent")
    webhook = await desk.webhook()
    await desk.start()
    done = await ended(desk, webhook, await replay(desk, webhook, "missed"))
    await desk.settled(webhook, 1)
    shown = await desk.ask("DELETE", f"/webhooks/{webhook}/replays/{done['id']}")
    assert (shown["status"], shown["queued"], shown["reason"]) == ("done", 1, None)


async def test_replays_are_listed_and_are_nobody_elses(desk: Desk) -> None:
    webhook, other = await desk.webhook(), await desk.webhook()
    jobs = [(await replay(desk, webhook, "missed"))["id"] for _ in range(3)]
    await replay(desk, other, "missed")
    first = await desk.ask("GET", f"/webhooks/{webhook}/replays", params={"limit": 2})
    assert [each["id"] for each in first["data"]] == jobs[:0:-1]
    rest = await desk.ask("GET", f"/webhooks/{webhook}/replays", params={"after": first["next"]})
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == (jobs[:1], False)
    newer = await desk.ask("GET", f"/webhooks/{webhook}/replays", params={"before": jobs[0], "limit": 1})
    assert [each["id"] for each in newer["data"]] == [jobs[1]]
    await desk.ask("GET", f"/webhooks/{webhook}/replays", params={"after": webhook}, status=422)
    for method in ("GET", "DELETE"):
        await desk.ask(method, f"/webhooks/{other}/replays/{jobs[0]}", status=404)
    await desk.ask("DELETE", f"/webhooks/{webhook}/replays/{jobs[0]}", status=404, key=desk.api.keys["rival"])


async def test_types_of_a_replay_may_be_prefixes(desk: Desk) -> None:
    await desk.emit("email.sent", "email.opened", "template.created")
    webhook = await desk.webhook(events=["*"])
    assert await count(desk, webhook, "all", types=["email.*"]) == 2
    assert await count(desk, webhook, "all", types=["email.opened", "template.*"]) == 2
    assert await count(desk, webhook, "all", types=["*"]) == 3
    body = {"since": EVER, "status": "all", "types": ["email."]}
    refused = await desk.ask("POST", f"/webhooks/{webhook}/replay", body, status=422)
    assert [error["field"] for error in refused["errors"]] == ["types[0]"]
