"""One delivery: its attempts, its bytes, the command that sends it again, and sending it again."""

from __future__ import annotations

import html
import re
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest

from dispatcher.web.dashboard.curl import SECRET

if TYPE_CHECKING:
    from tests.web.dashboard.conftest import Browser, House

HEAD = b"HTTP/1.1 500 Oh no\r\nX-Trace: <b>1</b>\r\nX-Odd\x00: \x1b[31m\xff\r\nServer: a: b"


async def made(house: House, state: str = "retrying", **rest: Any) -> tuple[dict[str, Any], Any, str]:
    webhook = await house.webhook(url="https://example.com/hook?a=1&b=2", headers={"X-Own": "mine"})
    event = await house.event("email.bounced", '{"reason": "User not found", "n": 1.0}')
    return webhook, event, await house.attempt(webhook["id"], event, state, **rest)


def pre(text: str, id_: str) -> str:
    found = re.search(rf'<pre[^>]* id="{id_}"[^>]*>(.*?)</pre>', text, re.DOTALL)
    assert found, id_
    return html.unescape(re.sub(r"<[^>]*>", "", found[1]))


async def test_the_timeline_tells_each_attempt_and_the_next(house: House, browser: Browser):
    _, _, delivery = await made(house, error="500", response_head=HEAD, response_body=b'{"why": "<i>"}')
    words = (await browser.get(f"/deliveries/{delivery}")).words
    assert re.search(r"retrying The first attempt failed\. The next one is due in (5\d s|1 min) \.", words)
    assert "Attempt 2 due in" in words
    assert "Attempt 1 500" in words
    assert "took 12 ms" in words
    assert "It answers 500: its handler fails." in words
    assert "Event committed" in words
    assert "1 of at most 4" in words


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("delivered", "Accepted by the first attempt."),
        ("exhausted", "Given up. Its only attempt failed, and nothing more is sent unless you send it again."),
        ("discarded", "Refused, and it will not be sent again: the reason is below."),
    ],
)
async def test_a_state_is_said_in_words(house: House, browser: Browser, state: str, said: str):
    _, _, delivery = await made(house, state)
    assert said in (await browser.get(f"/deliveries/{delivery}")).words


async def test_what_is_held_says_by_what(house: House, browser: Browser):
    webhook = await house.webhook()
    event = await house.event()
    await house.pending(webhook["id"], event)
    [delivery] = re.findall(r'<tr data-key="([^"]+)">', (await browser.get(f"/events/{event['id']}")).text)
    assert (
        "Queued: it is sent as soon as the webhook can take it." in (await browser.get(f"/deliveries/{delivery}")).words
    )
    await house.db.execute("UPDATE dispatcher.endpoint SET status = 'paused'")
    page = await browser.get(f"/deliveries/{delivery}")
    assert "Held, because its webhook is paused." in page.words
    assert f'action="/webhooks/{webhook["id"]}/resume"' in page.text


async def test_the_request_is_shown_to_the_byte(house: House, browser: Browser):
    webhook, event, delivery = await made(house)
    page = await browser.get(f"/deliveries/{delivery}")
    created = datetime.strftime(event["created_at"], "%Y-%m-%dT%H:%M:%SZ")
    assert pre(page.text, "request-body-raw") == (
        f'{{"id":"{event["id"]}","type":"email.bounced","version":"1.0","created_at":"{created}",'
        f'"data":{{"reason":"User not found","n":1}}}}'
    )
    for words in (
        "POST /hook?a=1&b=2 HTTP/1.1",
        "Host example.com",
        "X-Own mine",
        "X-Trackpost-Attempt 1",
        "webhook-signature …",
    ):
        assert words in page.words, words
    assert webhook["secret"] not in page.text


async def test_it_can_be_copied_as_a_command_without_the_secret(house: House, browser: Browser):
    webhook, event, delivery = await made(house)
    command = pre((await browser.get(f"/deliveries/{delivery}")).text, "curl")
    assert "'https://example.com/hook?a=1&b=2'" in command
    assert "-H 'X-Own: mine'" in command
    assert f'"id":"{event["id"]}"' in command
    assert f"${SECRET}" in command
    assert webhook["secret"] not in command


async def test_whatever_an_endpoint_answers_is_shown_and_is_no_markup(house: House, browser: Browser):
    _, _, delivery = await made(
        house, error="500", response_head=HEAD, response_body=b"<script>alert(1)</script>\x1b[2J"
    )
    page = await browser.get(f"/deliveries/{delivery}")
    assert "HTTP/1.1 500 Oh no" in page.words
    assert "X-Trace <b>1</b>" in page.words
    assert "Server a: b" in page.words
    assert "<script>alert" not in page.text
    assert "\x1b" not in page.text
    assert "\x00" not in page.text
    assert '<span class="escaped">\\x1b</span>[2J' in page.text


@pytest.mark.parametrize("body", [b"\x00\x01\x02", b"\xff\xfe\xfd", bytes(range(256))])
async def test_a_binary_answer_is_shown_in_hexadecimal(house: House, browser: Browser, body: bytes):
    _, _, delivery = await made(house, error="500", response_body=body)
    rows = pre((await browser.get(f"/deliveries/{delivery}")).text, "response-body-1").splitlines()
    assert b"".join(bytes.fromhex(row[8:56]) for row in rows) == body


async def test_one_click_sends_it_again(house: House, browser: Browser):
    webhook, _, delivery = await made(house, "exhausted")
    answer = await browser.post(f"/deliveries/{delivery}/retry")
    assert answer.status == 303
    fresh = answer.location.partition("?")[0].rpartition("/")[2]
    assert fresh != delivery
    page = await browser.get(answer.location)
    assert "Queued as a new delivery, which is this one." in page.words
    assert "made later of it, by hand or by a replay" in page.words
    assert await house.db.fetchval("SELECT count(*) FROM dispatcher.pending") == 1
    assert webhook["url"] in page.words


async def test_a_disabled_webhook_offers_no_button_and_refuses(house: House, browser: Browser):
    _, _, delivery = await made(house, "exhausted")
    await house.db.execute("UPDATE dispatcher.endpoint SET status = 'disabled', disabled_reason = 'x'")
    assert f"/deliveries/{delivery}/retry" not in (await browser.get(f"/deliveries/{delivery}")).text
    answer = await browser.post(f"/deliveries/{delivery}/retry")
    assert answer.status == 409
    assert "resume it first" in answer.words


async def test_without_its_event_a_delivery_shows_what_is_left(house: House, browser: Browser):
    _, event, delivery = await made(house, "delivered")
    await house.db.execute("DELETE FROM dispatcher.outbox WHERE seq = $1", event["seq"])
    page = await browser.get(f"/deliveries/{delivery}")
    assert page.status == 200
    assert "older than events are kept" in page.words
    assert "/retry" not in page.text


async def test_a_webhook_that_was_changed_since_is_said_to_be(house: House, browser: Browser):
    _, _, delivery = await made(house, "delivered")
    assert "was changed after" not in (await browser.get(f"/deliveries/{delivery}")).words
    await house.db.execute("UPDATE dispatcher.endpoint SET updated_at = now() + interval '1 hour'")
    assert "was changed after the last attempt" in (await browser.get(f"/deliveries/{delivery}")).words


async def test_another_accounts_delivery_does_not_exist(house: House, browser: Browser, rival: Browser):
    _, _, delivery = await made(house)
    assert (await rival.get(f"/deliveries/{delivery}")).status == 404
    assert (await rival.post(f"/deliveries/{delivery}/retry")).status == 404
    assert (await browser.get("/deliveries/dlv_none")).status == 404
    assert await house.db.fetchval("SELECT count(*) FROM dispatcher.pending") == 1


async def test_sending_again_needs_the_forms_token(house: House, browser: Browser):
    _, _, delivery = await made(house, "exhausted")
    assert (await browser.post(f"/deliveries/{delivery}/retry", token="")).status == 403
    assert await house.db.fetchval("SELECT count(*) FROM dispatcher.pending") == 0
