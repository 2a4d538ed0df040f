"""Events: the list with its filters and pages, and one event with what became of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.web.dashboard.conftest import Browser, House

HOSTILE = '{"</script>": "<img src=x onerror=alert(1)>", "name": "a\u202eb"}'


def shown(text: str) -> list[str]:
    """The ids in the list, in order."""
    return re.findall(r'<tr data-key="([^"]+)">', text)


async def emitted(house: House, count: int, type_: str = "email.sent") -> list[str]:
    """The newest first; those of one millisecond have no order but that of their ids."""
    return sorted([(await house.event(type_))["id"] for _ in range(count)], reverse=True)


async def discard(house: House, event, reason: str = "data is not an object") -> None:
    await house.db.execute("INSERT INTO dispatcher.discarded_event VALUES ($1, now(), $2)", event["seq"], reason)


async def test_pages_lead_to_older_and_back_to_newer(house: House, browser: Browser):
    ids = await emitted(house, 60)
    pages, path = [], "/events"
    while path:
        page = await browser.get(path)
        pages.append(shown(page.text))
        older = re.search(r'rel="next" href="([^"]+)"', page.text)
        path = older[1].replace("&amp;", "&") if older else ""
    assert pages == [ids[:25], ids[25:50], ids[50:]]
    back = re.search(r'rel="prev" href="([^"]+)"', page.text)
    assert shown((await browser.get(back[1])).text) == ids[25:50]


async def test_the_first_page_is_live_and_no_other(house: House, browser: Browser):
    await emitted(house, 30)
    first = await browser.get("/events")
    assert 'data-live="held"' in first.text
    assert 'data-live="held"' not in (await browser.get(re.search(r'rel="next" href="([^"]+)"', first.text)[1])).text


async def test_filters_stand_in_the_address_and_are_kept_from_page_to_page(house: House, browser: Browser):
    wanted = await emitted(house, 30, "email.bounced")
    await emitted(house, 5)
    page = await browser.get("/events?type=email.bounced&status=")
    assert shown(page.text) == wanted[:25]
    assert 'value="email.bounced"' in page.text
    older = re.search(r'rel="next" href="([^"]+)"', page.text)[1]
    assert shown((await browser.get(older.replace("&amp;", "&"))).text) == wanted[25:]


async def test_discarded_events_say_why_and_can_be_picked(house: House, browser: Browser):
    await emitted(house, 3)
    event = await house.event("email.sent", "[]")
    await discard(house, event, "data is <not> an object")
    page = await browser.get("/events?status=discarded")
    assert shown(page.text) == [event["id"]]
    assert "data is <not> an object" in page.words
    one = await browser.get(f"/events/{event['id']}")
    assert "No webhook was sent this event: data is <not> an object." in one.words


async def test_an_id_leads_to_its_event_and_an_unknown_one_is_said_to_be(house: House, browser: Browser):
    [event_id] = await emitted(house, 1)
    assert (await browser.get(f"/events?id={event_id}")).location == f"/events/{event_id}"
    page = await browser.get("/events?id=evt_none")
    assert page.status == 422
    assert "There is no such event" in page.words


async def test_a_type_that_is_none_is_said_to_be(browser: Browser):
    page = await browser.get("/events?type=Not+A+Type")
    assert page.status == 422
    assert 'A type looks like "email.delivered".' in page.words


async def test_odd_parameters_lead_to_the_list(house: House, browser: Browser):
    ids = await emitted(house, 2)
    for query in ("after=%00", "before=%3Cb%3E", "status=odd", "after=a&before=a", "type=&id=&status="):
        assert shown((await browser.get(f"/events?{query}")).text) == ids, query


async def test_nothing_yet_says_how_to_begin(browser: Browser):
    page = await browser.get("/events")
    assert "No events yet" in page.words
    assert "INSERT INTO dispatcher.outbox (account, type, data) VALUES ('acme'" in page.words


async def test_nothing_in_an_event_becomes_markup(house: House, browser: Browser):
    event = await house.event("<script>alert(1)</script>", HOSTILE)
    for path in ("/events", f"/events/{event['id']}"):
        page = await browser.get(path)
        assert "<script>alert" not in page.text
        assert "<img" not in page.text
        assert '<span class="escaped">\\u202e</span>' in page.text


async def test_an_event_shows_its_deliveries_at_every_webhook(house: House, browser: Browser):
    event = await house.event("email.bounced", '{"n": 1.0}')
    urls = ["https://a.example/", "https://b.example/", "https://c.example/"]
    done, again, waits = [await house.webhook(url=url) for url in urls]
    delivered = await house.attempt(done["id"], event, "delivered")
    retrying = await house.attempt(again["id"], event, "retrying")
    await house.pending(waits["id"], event)
    page = await browser.get(f"/events/{event['id']}")
    assert set(shown(page.text)) > {delivered, retrying}
    assert len(shown(page.text)) == 3
    said = ("a.example delivered 200 delivered 200 1", "b.example retrying 500 next in", "c.example pending – pending")
    for words in (*said, '"n": 1.0'):
        assert words in page.words, page.words
    assert page.text.count("Send again to") == 3


async def test_an_event_nobody_asked_for_says_so(house: House, browser: Browser):
    event = await house.event()
    assert "no webhook asked for email.sent" in (await browser.get(f"/events/{event['id']}")).words


async def test_another_accounts_events_are_nowhere(house: House, rival: Browser):
    event = await house.event()
    assert (await rival.get(f"/events/{event['id']}")).status == 404
    assert shown((await rival.get("/events")).text) == []
    assert (await rival.get(f"/events?id={event['id']}")).status == 422
    assert shown((await rival.get(f"/events?before={event['id']}")).text) == []


async def test_deliveries_to_another_accounts_webhook_are_not_shown(house: House, browser: Browser):
    """There are none, unless something else went wrong: then this page does not tell of it."""
    event = await house.event()
    theirs = await house.webhook("rival", url="https://theirs.example/")
    await house.attempt(theirs["id"], event, "delivered")
    await house.pending(theirs["id"], await house.event())
    assert "theirs.example" not in (await browser.get(f"/events/{event['id']}")).text
