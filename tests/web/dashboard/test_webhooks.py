"""Adding, changing, testing, rotating, pausing, replaying and deleting webhooks by forms."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from dispatcher.core.attempt import Attempt
from dispatcher.core.signing import standard_key
from dispatcher.model import BodyStyle, Result
from dispatcher.web.dashboard.visits import SESSION_COOKIE, ZONE_COOKIE

if TYPE_CHECKING:
    from tests.web.dashboard.conftest import Browser, House, Seen

NEW = {"url": "https://example.com/new", "events": "email.*", "signing": "new"}
FULL = {
    **NEW,
    "description": " For the books ",
    "events_more": "billing.eu.*, email.sent",
    "signing": "own",
    "secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "headers": "X-Tenant: blue\r\n\r\nX-Zone:eu:1",
    "body_style": "python",
    "retry": "custom",
    "retry_custom": "30s, 5m 1h",
    "max_concurrency": "3",
    "rate_limit": "2.5",
    "timeout_s": "12",
    "ordered": "yes",
}


def answering(*statuses: int) -> list[Attempt]:
    return [
        Attempt(
            Result.OK if status < 300 else Result.CLIENT_ERROR,
            status=status,
            head=b"HTTP/1.1 %d X\r\nX-Answer: yes\r\n\r\n" % status,
            body=b'{"said": "so"}',
        )
        for status in statuses
    ]


async def row(house: House) -> Any:
    return await house.db.fetchrow("SELECT * FROM dispatcher.endpoint")


def value(page: Seen, name: str) -> str:
    """What a text field holds."""
    found = re.search(rf'<input[^>]*\bname="{name}"[^>]*\bvalue="([^"]*)"', page.text)
    assert found, name
    return found[1]


def checked(page: Seen, name: str) -> list[str]:
    """Which boxes of a name are ticked."""
    return re.findall(rf'name="{name}" value="([^"]*)" checked', page.text)


# -- adding


async def test_a_new_webhook_shows_its_secret_once(house: House, browser: Browser) -> None:
    page = await browser.post("/webhooks/new", NEW)
    assert page.status == 201
    record = await row(house)
    found = await house.parts.endpoints.secret(record["account_id"], record["public_id"])
    assert found is not None
    assert found.current is not None
    assert found.current in page.words
    assert record["events"] == ["email.*"]
    assert f'data-address="/webhooks/{record["public_id"]}"' in page.text


async def test_every_option_can_be_set(house: House, browser: Browser) -> None:
    page = await browser.post("/webhooks/new", FULL)
    assert page.status == 201, page.words
    assert FULL["secret"] not in page.text
    record = await row(house)
    shown = {name: record[name] for name in ("description", "events", "body_style", "max_concurrency", "rate_limit")}
    assert shown == {
        "description": "For the books",
        "events": ["email.*", "billing.eu.*", "email.sent"],
        "body_style": "python",
        "max_concurrency": 3,
        "rate_limit": 2.5,
    }
    assert (record["retry"], record["timeout_s"], record["ordered"]) == ("[30.0,300.0,3600.0]", 12, True)
    assert record["headers"] == '{"X-Tenant":"blue","X-Zone":"eu:1"}'


async def test_several_boxes_of_types(house: House, browser: Browser) -> None:
    pairs = [("url", NEW["url"]), ("events", "email.sent"), ("events", "email.bounced"), ("signing", "none")]
    page = await browser.post("/webhooks/new", pairs)
    assert page.status == 201
    assert "not signed" in page.words
    record = await row(house)
    assert (record["events"], record["secret"]) == (["email.sent", "email.bounced"], None)


async def test_a_webhook_without_events_is_asked_for_one(house: House, browser: Browser) -> None:
    page = await browser.post("/webhooks/new", {**NEW, "events": ""})
    assert page.status == 422
    assert re.findall(r'<p class="error"[^>]*>(.*?)</p>', page.text) == ["Choose at least one."]
    assert await row(house) is None


@pytest.mark.parametrize(
    ("field", "text", "says"),
    [
        ("url", "", "looks like"),
        ("url", "http://example.com/", "https"),
        ("url", "https://10.0.0.1/", "private address"),
        ("events", "email.bouncd", "did you mean"),
        ("secret", "", "Expected text of 1 to 256"),
        ("headers", "Host: x", "Host"),
        ("headers", "no colon", "Name: value"),
        ("headers", "A: 1\nA: 2", "Name: value"),
        ("retry_custom", "soon", "soon"),
        ("max_concurrency", "many", "Expected a whole number"),
        ("max_concurrency", "1e9", "Expected a whole number"),
        ("max_concurrency", "1000", "1 to 16"),
        ("rate_limit", "0", "Expected a number"),
        ("timeout_s", "301", "Expected a number of seconds"),
        ("timeout_s", '1,"secret":"x"', "Expected a number of seconds"),
        ("description", "x" * 1025, "at most 1024"),
        ("body_style", "yaml", "compact"),
    ],
)
async def test_what_is_wrong_is_said_beside_the_field_and_everything_is_kept(
    house: House, browser: Browser, field: str, text: str, says: str
) -> None:
    page = await browser.post("/webhooks/new", FULL | {field: text})
    assert page.status == 422
    errors = re.findall(r'<p class="error"[^>]*>(.*?)</p>', page.text)
    assert len(errors) == 1, errors
    assert says in errors[0].replace("&#34;", '"')
    assert await row(house) is None
    for name in ("url", "description", "retry_custom", "max_concurrency", "rate_limit", "timeout_s"):
        assert value(page, name) == (text if field == name else FULL[name]).replace('"', "&#34;")
    assert FULL["secret"] not in page.text
    if field not in {"body_style", "events"}:
        assert checked(page, "body_style") == ["python"]
        assert checked(page, "events") == ["email.*"]


async def test_types_can_be_chosen_by_the_address(browser: Browser) -> None:
    page = await browser.get("/webhooks/new?events=email.sent&events=own.type")
    assert checked(page, "events") == ["email.sent"]
    assert value(page, "events_more") == "own.type"


# -- changing


def entered(page: Seen) -> dict[str, str]:
    """What the form of an edit page would send as it stands."""
    names = (
        "url",
        "description",
        "events_more",
        "retry_custom",
        "max_concurrency",
        "rate_limit",
        "timeout_s",
        "version",
    )
    form = {name: value(page, name) for name in names}
    form |= {"signing": "keep", "body_style": checked(page, "body_style")[0]}
    found = re.search(r'<textarea[^>]*name="headers"[^>]*>([^<]*)</textarea>', page.text)
    assert found
    form["headers"] = found[1]
    form["events"] = "\n".join(checked(page, "events"))
    retry = re.search(r'<option value="(\w+)" selected>', page.text)
    assert retry
    form["retry"] = retry[1]
    return form | {"ordered": "yes" if checked(page, "ordered") else ""}


async def test_what_the_form_shows_changes_nothing(house: House, browser: Browser) -> None:
    await browser.post("/webhooks/new", FULL)
    before = await row(house)
    address = f"/webhooks/{before['public_id']}"
    page = await browser.get(f"{address}/edit")
    answer = await browser.post(f"{address}/edit", entered(page))
    assert (answer.status, answer.location) == (303, f"{address}?note=saved")
    assert await row(house) == before


async def test_emptied_fields_are_defaults_again(house: House, browser: Browser) -> None:
    await browser.post("/webhooks/new", FULL)
    record = await row(house)
    empty = {"url": NEW["url"], "events": "*", "version": "1", "signing": "keep", "retry": "default"}
    assert (await browser.post(f"/webhooks/{record['public_id']}/edit", empty)).status == 303
    after = await row(house)
    assert (after["retry"], after["max_concurrency"], after["rate_limit"], after["timeout_s"]) == (None,) * 4
    assert (after["headers"], after["ordered"], after["description"]) == ("{}", False, "")
    assert after["secret"] == record["secret"]


async def test_a_change_in_between_is_not_lost(house: House, browser: Browser) -> None:
    webhook = await house.webhook(description="first")
    address = f"/webhooks/{webhook['id']}/edit"
    mine = entered(await browser.get(address)) | {"description": "mine"}
    await browser.post(address, mine | {"description": "theirs", "max_concurrency": "5"})
    page = await browser.post(address, mine)
    assert page.status == 409
    assert "Description: theirs" in page.words
    assert "Requests at a time: 5" in page.words
    assert (await row(house))["description"] == "theirs"
    assert value(page, "description") == "mine"
    assert (await browser.post(address, entered(page))).status == 303
    assert (await row(house))["description"] == "mine"


async def test_signing_can_be_ended_and_begun(house: House, browser: Browser) -> None:
    webhook = await house.webhook()
    address = f"/webhooks/{webhook['id']}"
    form = entered(await browser.get(f"{address}/edit"))
    await browser.post(f"{address}/edit", form | {"signing": "none"})
    assert (await row(house))["secret"] is None
    assert "not signed" in (await browser.get(address)).words
    await browser.post(f"{address}/rotate", {"signing": "new"})
    assert (await row(house))["secret"] is not None


# -- the secret


async def test_a_rotation_shows_the_new_secret_and_when_the_old_one_ends(house: House, browser: Browser) -> None:
    webhook = await house.webhook()
    page = await browser.post(f"/webhooks/{webhook['id']}/rotate", {"signing": "new", "grace_s": "3600"})
    assert page.status == 200
    found = re.search(r'<span id="rotated">(whsec_[^<]+)</span>', page.text)
    assert found
    assert standard_key(found[1])
    assert found[1] != webhook["secret"]
    assert await house.db.fetchval("SELECT previous_secret_expires_at - now() FROM dispatcher.endpoint") > timedelta(
        minutes=59
    )
    assert (
        "Rotating: the old secret signs as well and ends in 59 min"
        in (await browser.get(f"/webhooks/{webhook['id']}")).words
    )


@pytest.mark.parametrize("form", [{"signing": "own", "secret": ""}, {"signing": "own", "secret": "a\x07b"}])
async def test_a_secret_that_cannot_be_is_refused(house: House, browser: Browser, form: dict[str, str]) -> None:
    webhook = await house.webhook()
    before = await row(house)
    page = await browser.post(f"/webhooks/{webhook['id']}/rotate", form | {"grace_s": "0"})
    assert page.status == 422
    assert 'id="secret-error"' in page.text
    assert await row(house) == before


# -- pausing


async def test_pausing_shows_what_is_held_and_resuming_lets_it_go(house: House, browser: Browser) -> None:
    webhook = await house.webhook()
    address = f"/webhooks/{webhook['id']}"
    assert (await browser.post(f"{address}/pause")).location == f"{address}?note=paused"
    for _ in range(3):
        await house.pending(webhook["id"], await house.event())
    page = await browser.get(f"{address}?note=paused")
    assert "3 deliveries wait" in page.words
    assert "held until it is resumed" in page.words
    assert (await browser.post(f"{address}/resume", {"next": "/"})).location == "/?note=resumed"
    assert (await row(house))["status"] == "active"


async def test_a_disabled_webhook_says_why_and_can_be_resumed(house: House, browser: Browser) -> None:
    webhook = await house.webhook()
    await house.db.execute("UPDATE dispatcher.endpoint SET status = 'disabled', disabled_reason = 'answered 410'")
    address = f"/webhooks/{webhook['id']}"
    assert "Receives nothing: answered 410." in (await browser.get(address)).words
    assert (await browser.post(f"{address}/pause")).status == 409
    await browser.post(f"{address}/resume")
    assert (await row(house))["status"] == "active"


# -- test events


async def test_a_test_shows_what_came_back(house: House, browser: Browser) -> None:
    webhook = await house.webhook()
    house.endpoint.answers = answering(200)
    page = await browser.post(f"/webhooks/{webhook['id']}/test", {"type": "email.opened", "data": '{"a": 1}'})
    assert page.status == 200
    assert "Accepted 200 OK" in page.words
    assert "X-Answer yes" in page.words
    assert "said" in page.words
    trial = house.endpoint.trials[0]
    assert (trial.payload.type, trial.style) == ("email.opened", BodyStyle.COMPACT)
    assert b'"data":{"a":1}' in trial.payload.body(trial.style)


async def test_after_a_401_the_style_that_was_accepted_is_one_click_away(house: House, browser: Browser) -> None:
    webhook = await house.webhook()
    house.endpoint.answers = answering(401, 200)
    page = await browser.post(f"/webhooks/{webhook['id']}/test", {"type": "email.sent", "data": "{}"})
    assert "Not accepted 401 Unauthorized" in page.words
    assert "printed in the python style" in page.words
    assert "Use the python style" in page.words
    answer = await browser.post(f"/webhooks/{webhook['id']}/style", {"style": "python"})
    assert answer.location == f"/webhooks/{webhook['id']}/test?note=styled"
    assert (await row(house))["body_style"] == "python"


async def test_where_no_style_helps_none_is_offered(house: House, browser: Browser) -> None:
    webhook = await house.webhook()
    house.endpoint.answers = answering(401)
    page = await browser.post(f"/webhooks/{webhook['id']}/test", {"type": "email.sent", "data": "{}"})
    assert "Use the" not in page.words
    assert "It accepted neither body style" in page.words


async def test_an_unreachable_endpoint_is_told_in_words(house: House, browser: Browser) -> None:
    webhook = await house.webhook()
    house.endpoint.answers = [Attempt(Result.DNS, error="no such name")]
    page = await browser.post(f"/webhooks/{webhook['id']}/test", {"type": "email.sent", "data": "{}"})
    assert "dns: no such name" in page.words
    assert "It could not be reached: no such name." in page.words
    house.endpoint.answers = [Attempt(Result.TIMEOUT, error="timed out after 30 s (headers)")]
    page = await browser.post(f"/webhooks/{webhook['id']}/test", {"type": "email.sent", "data": "{}"})
    assert "It takes too long: timed out after 30 s (headers). Let its handler answer 2xx at once" in page.words


@pytest.mark.parametrize(
    ("data", "says"),
    [("", "Expected JSON"), ("{bad", "in line 1, column 2"), ("[1]", "object"), ('{"a": NaN}', "NaN"),
     ('{}, "type": "x"', "Expected JSON"), ("[" * 100_000, "nested"), ('{"a":1,"a":2}', "repeats a key")],
)  # fmt: skip
async def test_data_that_cannot_be_sent_is_kept_and_explained(
    house: House, browser: Browser, data: str, says: str
) -> None:
    webhook = await house.webhook()
    page = await browser.post(f"/webhooks/{webhook['id']}/test", {"type": "email.sent", "data": data})
    assert page.status == 422
    errors = re.findall(r'<p class="error" id="data-error">(.*?)</p>', page.text)
    assert len(errors) == 1
    assert says.lower() in errors[0].lower()
    assert not house.endpoint.trials
    assert data.replace('"', "&#34;") in page.text


# -- replays


async def test_a_replay_is_counted_before_it_begins(house: House, browser: Browser) -> None:
    webhook = await house.webhook()
    for state in ("exhausted", "exhausted", "delivered"):
        await house.attempt(webhook["id"], await house.event(), state)
    address = f"/webhooks/{webhook['id']}/replay"
    form = {"status": "failed", "since": "2026-01-01T00:00", "until": "", "types": ""}
    page = await browser.post(address, form | {"act": "preview"})
    assert "2 events would be sent" in page.words
    assert await house.db.fetchval("SELECT count(*) FROM dispatcher.replay") == 0
    assert "Replay 2 events" in page.words
    answer = await browser.post(address, form | {"act": "begin"})
    assert answer.location == f"{address}?note=replaying"
    assert await house.db.fetchval("SELECT selection FROM dispatcher.replay") == "failed"
    assert "running" in (await browser.get(address)).words
    assert "running" in (await browser.get(f"/webhooks/{webhook['id']}")).words


async def test_a_replay_can_be_cancelled(house: House, browser: Browser, rival: Browser) -> None:
    webhook = await house.webhook()
    address = f"/webhooks/{webhook['id']}"
    await browser.post(f"{address}/replay", {"status": "all", "since": "2026-01-01T00:00", "act": "begin"})
    job = await house.db.fetchval("SELECT id FROM dispatcher.replay")
    assert (await rival.post(f"{address}/replays/{job}/cancel")).status == 404
    assert await house.db.fetchval("SELECT status FROM dispatcher.replay") == "running"
    answer = await browser.post(f"{address}/replays/{job}/cancel")
    assert answer.location == f"{address}/replay?note=cancelled"
    assert "cancelled by its owner" in (await browser.get(f"{address}/replay")).words
    assert (await browser.post(f"{address}/replays/{job}/cancel")).location == f"{address}/replay?note=cancelled"
    await house.db.execute("UPDATE dispatcher.replay SET status = 'done', reason = NULL")
    assert (await browser.post(f"{address}/replays/{job}/cancel")).location == f"{address}/replay"
    assert (await browser.post(f"{address}/replays/rpl_none/cancel")).status == 404


@pytest.mark.parametrize(
    ("field", "text"),
    [("since", ""), ("since", "soon"), ("until", "2000-01-01T00:00"), ("types", "Bad"), ("status", "x")],
)
async def test_a_replay_that_makes_no_sense_says_where(house: House, browser: Browser, field: str, text: str) -> None:
    webhook = await house.webhook()
    form = {"status": "all", "since": "2026-01-01T00:00", "until": "", "types": "", "act": "begin"} | {field: text}
    page = await browser.post(f"/webhooks/{webhook['id']}/replay", form)
    assert page.status == 422
    assert len(re.findall(r'class="error"', page.text)) == 1
    assert await house.db.fetchval("SELECT count(*) FROM dispatcher.replay") == 0


async def test_times_are_those_of_the_reader(house: House, browser: Browser) -> None:
    browser.client.session.cookie_jar.update_cookies({ZONE_COOKIE: "Asia/Tokyo"}, browser.client.make_url("/"))
    webhook = await house.webhook()
    form = {"status": "all", "since": "2026-01-01T09:00", "until": "2026-01-02T09:00", "act": "begin"}
    await browser.post(f"/webhooks/{webhook['id']}/replay", form)
    record = await house.db.fetchrow("SELECT since, until FROM dispatcher.replay")
    assert [at.isoformat() for at in record] == ["2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"]


@pytest.mark.parametrize("zone", ["Nowhere/Land", "../../etc/passwd", "/etc/passwd", "Europe", "%00", "x" * 3000])
async def test_a_zone_that_is_none_is_utc(browser: Browser, zone: str) -> None:
    session = browser.cookies[SESSION_COOKIE]
    page = await browser.get("/", Cookie=f"{SESSION_COOKIE}={session}; {ZONE_COOKIE}={zone}")
    assert page.status == 200
    assert "UTC</time>" in page.text


# -- deleting


async def test_deleting_asks_first_and_then_is_done(house: House, browser: Browser) -> None:
    webhook = await house.webhook()
    await house.pending(webhook["id"], await house.event())
    page = await browser.get(f"/webhooks/{webhook['id']}/delete")
    assert "1 delivery that waits is dropped" in page.words
    assert await row(house) is not None
    answer = await browser.post(f"/webhooks/{webhook['id']}/delete")
    assert answer.location == "/webhooks?note=deleted"
    assert await row(house) is None


# -- the list


async def test_the_list_says_the_state_and_why(house: House, browser: Browser) -> None:
    for path in ("fine", "paused", "disabled", "failing"):
        await house.webhook(url=f"https://example.com/{path}", description=f"for {path}")
    update = "UPDATE dispatcher.endpoint SET status = $1, disabled_reason = $2 WHERE url LIKE '%/' || $1"
    await house.db.execute(update, "paused", None)
    await house.db.execute(update, "disabled", "answered 410")
    await house.db.execute(
        "INSERT INTO dispatcher.endpoint_health (endpoint_id, failing_since, last_error)"
        " SELECT id, now() - interval '2 h', '401' FROM dispatcher.endpoint WHERE url LIKE '%/failing'"
    )
    words = (await browser.get("/webhooks")).words
    for text in ("paused since", "Receives nothing: answered 410.", "it does not accept the signature"):
        assert text in words
    for status, count in (("active", 2), ("paused", 1), ("disabled", 1), ("trouble", 3), ("", 4)):
        assert (await browser.get(f"/webhooks?status={status}")).text.count('class="url"') == count
    assert (await browser.get("/webhooks?q=FOR+fail")).text.count('class="url"') == 1
    assert "No webhook matches" in (await browser.get("/webhooks?q=nothing")).words


async def test_the_list_turns_pages_without_loss(house: House, browser: Browser) -> None:
    made = {(await house.webhook(url=f"https://example.com/{n}"))["id"] for n in range(30)}
    seen, path = [], "/webhooks?q=example"
    while path:
        page = await browser.get(path)
        seen += re.findall(r'class="url" href="/webhooks/([^"]+)"', page.text)
        older = re.search(r'rel="next" href="([^"]+)"', page.text)
        path = older[1].replace("&amp;", "&") if older else ""
    assert len(seen) == 30
    assert set(seen) == made


async def test_sparklines_tell_the_last_day(house: House, browser: Browser) -> None:
    webhook = await house.webhook()
    for state in ("delivered", "delivered", "exhausted"):
        await house.attempt(webhook["id"], await house.event(), state)
    assert "Last 24 hours: delivered 2, retrying 0, failed 1" in (await browser.get("/webhooks")).words
