"""The guide's steps, by clicking, and everything a person does with a webhook afterwards."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import signal
from collections.abc import Mapping
from typing import Any

import pytest
from conftest import Window
from playwright.async_api import Page, expect
from stage import Stage
from standardwebhooks import Webhook

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def url_is(page: Page, pattern: str) -> None:
    await page.wait_for_url(re.compile(pattern))


def event_of(request: tuple[Mapping[str, str], bytes]) -> Any:
    return json.loads(request[1])


# -- the guide


async def test_the_guides_steps(stranger: Window, stage: Stage):
    """Log in, Webhooks, Add Webhook, URL and events, Create Webhook; Send Test Event, type, Send; an event comes."""
    await stranger.sign_in(stage.key)
    page = stranger.page
    await page.get_by_role("link", name="Webhooks", exact=True).click()
    await page.get_by_role("link", name="Add Webhook", exact=True).first.click()
    await page.get_by_label("URL").fill(f"{stage.subscriber.url}/guide")
    await page.get_by_role("checkbox", name="email.delivered").check()
    await page.get_by_role("checkbox", name="email.bounced").check()
    await page.get_by_role("button", name="Create Webhook").click()
    await expect(page.get_by_role("heading", name="Webhook created")).to_be_visible()
    secret = await page.locator("#secret").inner_text()
    assert secret.startswith("whsec_")

    await page.get_by_role("link", name="Send Test Event").click()
    await page.get_by_label("Event type").select_option("email.bounced")
    await expect(page.get_by_label("Data")).to_have_value(re.compile("bounce_type"))
    await page.get_by_role("button", name="Send", exact=True).click()
    await expect(page.locator("#result")).to_contain_text("Accepted")
    [test] = stage.subscriber.at("/guide")
    assert event_of(test)["type"] == "email.bounced"
    Webhook(secret).verify(test[1], test[0])
    expected = hmac.new(secret.encode(), test[1], hashlib.sha256).hexdigest()
    assert test[0]["X-Trackpost-Signature"] == expected

    await page.get_by_role("link", name="Deliveries", exact=True).click()
    await expect(page.get_by_role("heading", name="No deliveries yet")).to_be_visible()
    await stage.emit("email.delivered")
    row = page.locator("tbody tr").filter(has_text=re.compile("email.\u200b?delivered"))
    await expect(row).to_contain_text("delivered")
    await row.get_by_role("link").click()
    await url_is(page, "/deliveries/dlv_")
    await expect(page.locator("#verdict")).to_contain_text("Accepted by the first attempt.")


async def test_what_is_wrong_is_said_beside_its_field(window: Window, stage: Stage):
    page = await window.open("/webhooks/new")
    await page.get_by_label("URL").fill("http://10.0.0.1/hook")
    await page.get_by_role("button", name="Create Webhook").click()
    field = page.get_by_label("URL")
    await expect(field).to_have_attribute("aria-invalid", "true")
    await expect(field).to_have_value("http://10.0.0.1/hook")
    described = (await field.get_attribute("aria-describedby") or "").split()[0]
    assert await page.locator(f"#{described}").inner_text()
    assert await stage.pool.fetchval("SELECT count(*) FROM dispatcher.endpoint WHERE url LIKE 'http://10.%'") == 0


async def test_a_test_finds_the_body_style_and_one_click_sets_it(window: Window, stage: Stage):
    webhook = await stage.webhook("/flask", events=["flask.*"])

    def flask(headers: Mapping[str, str], body: bytes) -> tuple[int, bytes]:
        printed = json.dumps(json.loads(body)).encode()
        expected = hmac.new(webhook["secret"].encode(), printed, hashlib.sha256).hexdigest()
        return (200, b"OK") if headers["X-Trackpost-Signature"] == expected else (401, b"Invalid signature")

    stage.subscriber.answers["/flask"] = flask
    page = await window.open(f"/webhooks/{webhook['id']}/test")
    await page.get_by_role("button", name="Send", exact=True).click()
    await expect(page.locator("#result")).to_contain_text("401")
    await page.get_by_role("button", name="Use the python style").click()
    await url_is(page, "/test")
    await page.get_by_role("button", name="Send", exact=True).click()
    await expect(page.locator("#result")).to_contain_text("Accepted")
    assert (await stage.api("GET", f"/webhooks/{webhook['id']}"))["body_style"] == "python"


# -- afterwards


async def test_pause_holds_and_resume_sends(window: Window, stage: Stage):
    webhook = await stage.webhook("/paused", events=["paused.*"])
    page = await window.open(f"/webhooks/{webhook['id']}")
    await page.get_by_role("button", name="Pause").click()
    await expect(page.locator("#state")).to_contain_text("Paused")
    for _ in range(3):
        await stage.emit("paused.one")
    await expect(page.locator("#state")).to_contain_text("3 deliveries wait")
    assert stage.subscriber.at("/paused") == []
    await page.get_by_role("button", name="Resume").click()
    await expect(page.locator("#latest")).to_contain_text("delivered")
    await expect(page.locator("#state")).to_have_text("")
    await expect(page.locator("#latest tbody tr")).to_have_count(3)
    assert len(stage.subscriber.at("/paused")) == 3


async def test_a_replay_counts_first_and_then_sends(window: Window, stage: Stage):
    for number in range(4):
        await stage.emit("replay.old", f'{{"number": {number}}}')
    webhook = await stage.webhook("/replayed", events=["replay.*"])
    page = await window.open(f"/webhooks/{webhook['id']}/replay")
    await page.locator("input[name=status][value=missed]").check()
    await page.get_by_role("button", name="Count them").click()
    await expect(page.get_by_text("4 events would be sent")).to_be_visible()
    assert stage.subscriber.at("/replayed") == []
    await page.get_by_role("button", name="Replay 4 events").click()
    await expect(page.locator("#replays")).to_contain_text("done")
    await expect(page.locator("#replays")).to_contain_text("4 queued of")
    await page.get_by_role("link", name="Overview", exact=True).last.click()
    await expect(page.locator("#latest tbody tr")).to_have_count(4)
    assert sorted(event_of(got)["data"]["number"] for got in stage.subscriber.at("/replayed")) == [0, 1, 2, 3]


async def test_after_a_rotation_both_secrets_sign(window: Window, stage: Stage):
    webhook = await stage.webhook("/rotated", events=["rotated.*"])
    page = await window.open(f"/webhooks/{webhook['id']}")
    await page.get_by_role("link", name="Rotate").click()
    await page.get_by_role("button", name="Rotate").click()
    fresh = await page.locator("#rotated").inner_text()
    assert fresh not in {"", webhook["secret"]}
    await expect(page.locator("#new-secret")).to_contain_text("the old one signs as well")
    await stage.emit("rotated.one")
    await expect(page.locator("#latest")).to_contain_text("delivered")
    [(headers, body)] = stage.subscriber.at("/rotated")
    for secret in (fresh, webhook["secret"]):
        Webhook(secret).verify(body, headers)
    await page.reload()
    assert fresh not in await page.content(), "a secret is shown once, and then when it is asked for"
    await page.get_by_role("button", name="Reveal secret").click()
    await expect(page.locator("#secret")).to_have_text(fresh)


async def test_the_log_is_filtered_in_the_address(window: Window, stage: Stage):
    stage.subscriber.answers["/filtered"] = lambda _, body: (200 if b"good" in body else 500, b"")
    webhook = await stage.webhook("/filtered", events=["filtered.*"], retry="none")
    for kind in ("good", "bad", "good"):
        await stage.delivery(
            webhook["id"], "delivered" if kind == "good" else "exhausted", await stage.emit(f"filtered.{kind}")
        )
    page = await window.open(f"/webhooks/{webhook['id']}/deliveries")
    rows = page.locator("#log tbody tr, .card.flush tbody tr")
    await expect(rows).to_have_count(3)
    await page.get_by_label("State").select_option("exhausted")
    await page.get_by_role("button", name="Filter").click()
    await url_is(page, "status=exhausted")
    await expect(rows).to_have_count(1)
    await expect(rows).to_contain_text("500")
    await window.open(f"/webhooks/{webhook['id']}/deliveries?type=filtered.good&status_class=2xx")
    await expect(rows).to_have_count(2)


async def test_the_log_announces_what_is_new_and_moves_nothing(window: Window, stage: Stage):
    webhook = await stage.webhook("/log", events=["log.*"])
    await stage.delivery(webhook["id"], "delivered", await stage.emit("log.first"))
    page = await window.open(f"/webhooks/{webhook['id']}/deliveries")
    row = page.locator("#log tbody tr").first
    await expect(row).to_be_visible()
    key = await row.get_attribute("data-key")
    await stage.emit("log.second")
    news = page.get_by_role("button", name="1 new")
    await expect(news).to_be_visible()
    assert await row.get_attribute("data-key") == key
    await news.click()
    await expect(row).to_contain_text(re.compile("log.\u200b?second"))


async def test_the_overview_shows_what_happens_as_it_happens(window: Window, stage: Stage):
    await stage.webhook("/feed", events=["feed.*"])
    page = await window.open("/")
    await expect(page.locator("[data-live-state]")).to_have_text("Live")
    event_id = await stage.emit("feed.news")
    place = f"{stage.subscriber.url.removeprefix('http://')}/feed"
    row = page.locator("#feed tbody tr").filter(has_text=place)
    await expect(row).to_contain_text("delivered")
    await row.get_by_role("link").first.click()
    await expect(page.locator("#facts")).to_contain_text(event_id)


async def test_a_page_outlives_the_daemon(window: Window, stage: Stage):
    await stage.webhook("/outlived", events=["outlived.*"])
    page = await window.open("/")
    state = page.locator("[data-live-state]")
    await expect(state).to_have_text("Live")
    await stage.daemon.end(signal.SIGKILL)
    await expect(state).to_have_text("Reconnecting")
    away = page.get_by_role("alert").filter(has_text="The dispatcher cannot be reached.")
    await expect(away).to_be_visible()
    await stage.emit("outlived.by_its_page")
    await stage.daemon.start()
    await expect(state).to_have_text("Live")
    await expect(away).to_be_hidden()
    await expect(page.locator("#feed tbody tr").filter(has_text="/outlived")).to_contain_text("delivered")
    window.troubles = [trouble for trouble in window.troubles if "net::ERR_" not in trouble]


async def test_deleting_asks_first(window: Window, stage: Stage):
    webhook = await stage.webhook("/deleted", events=["deleted.*"])
    page = await window.open(f"/webhooks/{webhook['id']}")
    await page.get_by_role("link", name="Delete webhook").click()
    dialog = page.get_by_role("dialog", name="Delete this webhook?")
    await expect(dialog).to_be_visible()
    await page.keyboard.press("Escape")
    await expect(dialog).to_be_hidden()
    await page.get_by_role("link", name="Delete webhook").click()
    await dialog.get_by_role("button", name="Delete").click()
    await expect(page.get_by_role("heading", name="Webhooks")).to_be_visible()
    left = await stage.pool.fetch("SELECT FROM dispatcher.endpoint WHERE public_id = $1", webhook["id"])
    assert left == []


# -- without a mouse


async def focused(page: Page) -> str:
    return str(await page.evaluate("(document.activeElement.textContent || document.activeElement.name).trim()"))


async def tab_to(page: Page, text: str) -> None:
    """Press Tab until something with this text has the focus; everybody can see that it has."""
    for _ in range(60):
        await page.keyboard.press("Tab")
        if (await focused(page)).startswith(text):
            style = await page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert style != "none", f"the focus on {text} can be seen"
            return
    raise AssertionError(f"{text} cannot be reached with the keyboard")


async def test_a_webhook_is_added_and_tested_without_a_mouse(stranger: Window, stage: Stage):
    page = await stranger.open("/sign-in")
    await page.keyboard.type(stage.key)  # the field has the focus
    await page.keyboard.press("Enter")
    await page.wait_for_url(f"{stage.url}/")
    await page.keyboard.press("Tab")
    assert await focused(page) == "Skip to content"
    await page.keyboard.press("Enter")
    assert await page.evaluate("document.activeElement.id") == "content"
    await page.evaluate("document.body.focus(); document.activeElement.blur()")
    await tab_to(page, "Webhooks")
    await page.keyboard.press("Enter")
    await url_is(page, "/webhooks$")
    await tab_to(page, "Add Webhook")
    await page.keyboard.press("Enter")
    await url_is(page, "/webhooks/new$")
    await page.keyboard.type(f"{stage.subscriber.url}/keys")  # the field has the focus
    for _ in range(3):
        await page.keyboard.press("Tab")
    await page.keyboard.press("Space")
    await expect(page.locator("input[name=events]:checked")).to_have_count(1)
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", name="Webhook created")).to_be_visible()
    await tab_to(page, "Send Test Event")
    await page.keyboard.press("Enter")
    await url_is(page, "/test$")
    while await focused(page) != "Send":
        await tab_to(page, "Send")
    await page.keyboard.press("Enter")
    await expect(page.locator("#result")).to_contain_text("Accepted")
    assert len(stage.subscriber.at("/keys")) == 1
