"""Events and deliveries in a real browser: what arrives while somebody looks, and what a click does."""

from __future__ import annotations

import asyncio
import os
import re

import pytest
from conftest import Window
from playwright.async_api import expect
from stage import Stage, until

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_new_events_are_announced_and_move_nothing_until_asked_for(window: Window, stage: Stage):
    for number in range(3):
        await stage.emit(f"held.n{number}")
    page = await window.open("/events?type=held.n2")
    first = page.locator("#events tbody tr").first
    await expect(page.locator("[data-live-state]")).to_have_text("Live")
    before = [await first.get_attribute("data-key"), await first.bounding_box()]
    event_id = await stage.emit("held.n2")
    news = page.get_by_role("button", name="1 new")
    await expect(news).to_be_visible()
    assert [await first.get_attribute("data-key"), await first.bounding_box()] == before
    await news.click()
    await expect(first).to_have_attribute("data-key", event_id)
    await expect(news).to_be_hidden()


async def test_the_first_event_shows_by_itself(window: Window, stage: Stage):
    page = await window.open("/events?type=first.ever")
    await expect(page.locator("[data-live-state]")).to_have_text("Live")
    event_id = await stage.emit("first.ever")
    await expect(page.locator(f"tr[data-key={event_id}]")).to_be_visible()


async def test_filters_are_in_the_address_and_can_be_shared(window: Window, stage: Stage):
    await stage.emit("filter.this")
    await stage.emit("filter.that")
    page = await window.open("/events")
    await page.get_by_label("Type").fill("filter.this")
    await page.get_by_role("button", name="Find").click()
    await page.wait_for_url(re.compile(r"type=filter\.this"))
    shared = await (await window.context.new_page()).goto(page.url)
    assert shared is not None
    text = await shared.text()
    assert "filter.this" in text
    assert "filter.that" not in text
    await page.get_by_role("link", name="Clear").click()
    await expect(page.get_by_role("link", name="filter.that").first).to_be_visible()


async def test_a_delivery_changes_state_before_the_readers_eyes(window: Window, stage: Stage):
    stage.subscriber.answers["/flaky"] = (500, b"not now")
    webhook = await stage.webhook("/flaky", events=["eyes.*"], retry=["2s"])
    event_id = await stage.emit("eyes.only")
    delivery = await stage.delivery(webhook["id"], "retrying", event_id)
    page = await window.open(f"/deliveries/{delivery['id']}")
    await expect(page.locator("#verdict .badge")).to_have_text("retrying")
    await expect(page.locator("#timeline")).to_contain_text("not now")
    stage.subscriber.answers["/flaky"] = (200, b"thanks")
    await expect(page.locator("#verdict .badge")).to_have_text("delivered")
    await expect(page.locator("#timeline")).to_contain_text("Attempt 2")
    await expect(page.locator("#timeline")).to_contain_text("thanks")


async def test_what_somebody_opened_stays_open_when_the_page_changes(window: Window, stage: Stage):
    stage.subscriber.answers["/open"] = (500, b'{"why":1}')
    webhook = await stage.webhook("/open", events=["open.*"], retry=["3s", "1h"])
    delivery = await stage.delivery(webhook["id"], "retrying", await stage.emit("open.it"))
    page = await window.open(f"/deliveries/{delivery['id']}")
    await page.get_by_text("Raw, to the byte").first.click()
    raw = page.locator("#response-body-1-raw")
    await expect(raw).to_be_visible()
    await expect(page.locator("#response-2")).to_be_attached()
    await expect(raw).to_be_visible()


async def test_a_click_sends_it_again_and_shows_it_arrive(window: Window, stage: Stage):
    stage.subscriber.answers["/once"] = (500, b"")
    webhook = await stage.webhook("/once", events=["once.*"], retry="none")
    delivery = await stage.delivery(webhook["id"], "exhausted", await stage.emit("once.more"))
    stage.subscriber.answers["/once"] = (200, b"")
    page = await window.open(f"/deliveries/{delivery['id']}")
    await page.get_by_role("button", name="Retry now").click()
    await expect(page.locator("#verdict .badge")).to_have_text("delivered")
    assert delivery["id"] not in page.url
    assert "note=" not in page.url


async def test_the_copied_command_sends_what_was_sent(window: Window, stage: Stage):
    webhook = await stage.webhook("/ok/copied", events=["copied.*"], headers={"X-Own": "it's mine"})
    delivery = await stage.delivery(webhook["id"], "delivered", await stage.emit("copied.once", '{"ü": "it\'s $HOME"}'))
    [original] = stage.subscriber.at("/ok/copied")
    await window.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = await window.open(f"/deliveries/{delivery['id']}")
    await page.get_by_text("Copy as curl").click()
    await page.get_by_role("button", name="Copy curl command").click()
    await expect(page.locator("#announcer")).to_have_text("Copied")
    command = await page.evaluate("navigator.clipboard.readText()")
    environ = {"PATH": os.environ["PATH"], "WEBHOOK_SECRET": webhook["secret"]}
    process = await asyncio.create_subprocess_exec("sh", "-c", command, env=environ, stdout=-1, stderr=-1)
    said = await process.communicate()
    assert process.returncode == 0, said
    [_, copied] = stage.subscriber.at("/ok/copied")
    changing = {"webhook-timestamp", "webhook-signature"}
    assert copied[1] == original[1]
    assert {name: value for name, value in copied[0].items() if name not in changing} == {
        name: value for name, value in original[0].items() if name not in changing
    }


async def test_nothing_that_came_from_outside_runs(window: Window, stage: Stage):
    hostile = "<img src=x onerror=document.title='bad'><script>document.title='bad'</script>"
    stage.subscriber.answers["/hostile"] = (500, hostile.encode())
    webhook = await stage.webhook(
        "/hostile", events=["hostile.*"], retry="none", description=hostile, headers={"X-Hostile": hostile}
    )
    event_id = await stage.emit("hostile.data", '{"</script>": "' + hostile + '"}')
    delivery = await stage.delivery(webhook["id"], "exhausted", event_id)
    for path in (f"/deliveries/{delivery['id']}", f"/events/{event_id}", "/events", "/", "/webhooks"):
        page = await window.open(path)
        assert "bad" not in await page.title()
        assert await page.locator("img").count() == 0


async def test_an_event_is_discarded_while_somebody_looks_at_the_list(window: Window, stage: Stage):
    page = await window.open("/events?status=discarded&type=odd.one")
    await expect(page.locator("[data-live-state]")).to_have_text("Live")
    event_id = await stage.emit("odd.one", "[1]")

    async def discarded() -> bool:
        return bool((await stage.api("GET", f"/events/{event_id}"))["reason"])

    await until(discarded, "the event to be discarded")
    await stage.emit("odd.two")  # something happens, so that the page looks again
    await expect(page.locator(f"tr[data-key={event_id}]")).to_contain_text("discarded")
