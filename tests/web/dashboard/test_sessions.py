"""Who gets in, for how long, and whose forms are taken."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest
from aiohttp.test_utils import TestClient, TestServer, make_mocked_request

from dispatcher.store.sessions import PER_KEY_MAX, SessionStore
from dispatcher.web.api import build_api_app
from dispatcher.web.dashboard.visits import GUEST_COOKIE, SESSION_COOKIE, Door, local_path, sign_in_path

if TYPE_CHECKING:
    from tests.web.dashboard.conftest import Browser, House

PAGES = ["/", "/webhooks", "/webhooks/new", "/webhooks/wh_1", "/webhooks/wh_1/deliveries", "/events", "/live"]


# -- signing in


async def test_a_key_opens_and_the_page_says_whose_it_is(house: House, browser: Browser) -> None:
    page = await browser.get("/")
    assert page.status == 200
    assert f"acme live key …{house.keys['acme'][-4:]}" in page.words


async def test_the_key_itself_is_on_no_page_and_in_no_cookie(house: House, browser: Browser) -> None:
    pages = [(await browser.get(path)).text for path in ("/", "/webhooks", "/webhooks/new")]
    assert not any(house.keys["acme"] in text for text in (*pages, *browser.cookies.values()))


@pytest.mark.parametrize("key", ["", "   ", "tp_live_unknown_and_long_enough_00000", "x" * 5000, "ключ", "\x00" * 20])
async def test_another_key_does_not(stranger: Browser, key: str) -> None:
    page = await stranger.get("/sign-in")
    answer = await stranger.post("/sign-in", {"key": key}, token=page.token)
    assert answer.status == 422
    assert 'role="alert"' in answer.text
    assert SESSION_COOKIE not in stranger.cookies


@pytest.mark.parametrize("path", PAGES)
async def test_a_stranger_is_led_to_the_door_and_back(stranger: Browser, path: str) -> None:
    answer = await stranger.get(path)
    assert answer.status == 303
    assert answer.location == ("/sign-in" if path == "/" else f"/sign-in?next={path}")


@pytest.mark.parametrize("path", ["/webhooks/new", "/webhooks/wh_1/pause", "/webhooks/wh_1/delete", "/sign-out"])
async def test_a_form_of_a_stranger_does_nothing(stranger: Browser, path: str) -> None:
    page = await stranger.get("/sign-in")
    assert (await stranger.post(path, token=page.token)).location == "/sign-in"


async def test_who_signs_in_goes_where_they_wanted_to(house: House, stranger: Browser) -> None:
    wanted = "/webhooks?q=a+b&status=paused"
    page = await stranger.get(f"/sign-in?next={quote(wanted)}")
    answer = await stranger.post("/sign-in", {"key": house.keys["acme"], "next": wanted}, token=page.token)
    assert (answer.status, answer.location) == (303, wanted)
    assert (await stranger.get(f"/sign-in?next={quote(wanted)}")).location == wanted


@pytest.mark.parametrize(
    "place",
    ["https://evil.example", "//evil.example", "/\\evil.example", "\\\\evil.example", "javascript:alert(1)", "evil",
     "///evil.example", "/\t/evil.example", "/\n//evil.example", "http:evil.example", "", "/\r\nSet-Cookie: a=b"],
)  # fmt: skip
async def test_nobody_is_sent_elsewhere(house: House, stranger: Browser, place: str) -> None:
    assert local_path(place) == "/"
    page = await stranger.get("/sign-in")
    answer = await stranger.post("/sign-in", {"key": house.keys["acme"], "next": place}, token=page.token)
    assert answer.location == "/"


def test_a_form_s_page_cannot_be_come_back_to() -> None:
    assert sign_in_path(make_mocked_request("POST", "/webhooks/wh_1/pause")) == "/sign-in"


async def test_too_many_attempts_have_to_wait_and_a_right_key_among_them(house: House, stranger: Browser) -> None:
    page = await stranger.get("/sign-in")
    answers = [
        await stranger.post("/sign-in", {"key": "tp_live_guess_guess_guess"}, token=page.token) for _ in range(25)
    ]
    assert [answer.status for answer in answers].count(422) == 20
    last = await stranger.post("/sign-in", {"key": house.keys["acme"]}, token=page.token)
    assert last.status == 429
    assert 1 <= int(last.headers["Retry-After"]) <= 5


# -- cookies


async def test_the_session_cookie_is_for_the_browser_alone(stranger: Browser) -> None:
    answer = await stranger.sign_in()
    cookie = next(text for text in answer.headers.getall("Set-Cookie") if text.startswith(SESSION_COOKIE))
    attributes = {part.strip().lower() for part in cookie.split(";")[1:]}
    assert {"httponly", "samesite=strict", "path=/"} <= attributes
    assert "secure" not in attributes


async def test_behind_https_it_is_bound_to_the_host(house: House, stranger: Browser) -> None:
    page = await stranger.get("/sign-in", **{"X-Forwarded-Proto": "https"})
    guest = page.headers["Set-Cookie"].split(";")[0]
    answer = await stranger.post(
        "/sign-in", {"key": house.keys["acme"]}, token=page.token, Cookie=guest, **{"X-Forwarded-Proto": "https"}
    )
    cookie = next(text for text in answer.headers.getall("Set-Cookie") if SESSION_COOKIE in text)
    assert cookie.startswith(f"__Host-{SESSION_COOKIE}=")
    assert "secure" in cookie.lower()
    assert "domain" not in cookie.lower()


async def test_signing_in_always_makes_a_new_session(house: House, stranger: Browser) -> None:
    """A session id that was planted, or was there before, is worth nothing afterwards."""
    planted = "A" * 43
    stranger.client.session.cookie_jar.update_cookies({SESSION_COOKIE: planted}, stranger.client.make_url("/"))
    await stranger.sign_in()
    first = stranger.cookies[SESSION_COOKIE]
    assert first != planted
    stranger.token = (await stranger.get("/")).token
    await stranger.post("/sign-out")
    await stranger.sign_in()
    second = stranger.cookies[SESSION_COOKIE]
    assert second not in {planted, first}
    store = SessionStore(house.db)
    assert [await store.find(each) for each in (planted, first)] == [None, None]
    assert await store.find(second) is not None


async def test_the_token_of_a_guest_is_worth_nothing_once_signed_in(house: House, stranger: Browser) -> None:
    page = await stranger.get("/sign-in")
    await stranger.sign_in()
    webhook = await house.webhook()
    assert (await stranger.post(f"/webhooks/{webhook['id']}/pause", token=page.token)).status == 403


async def test_a_table_of_sessions_lets_nobody_in(house: House, browser: Browser) -> None:
    stored = await house.db.fetchval("SELECT hash FROM dispatcher.session")
    assert browser.cookies[SESSION_COOKIE].encode() not in stored
    assert len(stored) == 32


# -- the end


async def test_signing_out_ends_the_session_everywhere(house: House, browser: Browser) -> None:
    session = browser.cookies[SESSION_COOKIE]
    answer = await browser.post("/sign-out")
    assert answer.location == "/sign-in"
    assert SESSION_COOKIE not in browser.cookies
    assert (await browser.get("/", Cookie=f"{SESSION_COOKIE}={session}")).location == "/sign-in"


async def test_a_revoked_key_ends_its_sessions_at_once(house: House, browser: Browser, rival: Browser) -> None:
    await house.parts.accounts.revoke_key(house.key_ids["acme"])
    assert (await browser.get("/webhooks")).status == 303
    assert (await rival.get("/webhooks")).status == 200


async def test_an_expired_session_is_none(house: House, browser: Browser) -> None:
    await house.db.execute("UPDATE dispatcher.session SET expires_at = now() - interval '1 second'")
    assert (await browser.get("/")).location == "/sign-in"


async def test_a_session_lives_on_while_it_is_used_but_not_for_ever(house: House, browser: Browser) -> None:
    read = "SELECT expires_at - now() FROM dispatcher.session"
    await house.db.execute("UPDATE dispatcher.session SET expires_at = now() + interval '1 hour'")
    await browser.get("/")
    assert await house.db.fetchval(read) > timedelta(hours=11)
    await house.db.execute(
        "UPDATE dispatcher.session SET expires_at = now() + interval '1 h', created_at = now() - interval '6 days 22 h'"
    )
    await browser.get("/")
    assert await house.db.fetchval(read) < timedelta(hours=2)


async def test_sessions_of_a_key_are_bounded_the_oldest_ends(house: House, browser: Browser) -> None:
    store = SessionStore(house.db)
    for _ in range(PER_KEY_MAX):
        await store.begin(house.key_ids["acme"])
    assert await house.db.fetchval("SELECT count(*) FROM dispatcher.session") == PER_KEY_MAX
    assert (await browser.get("/")).status == 303


async def test_a_session_outlives_the_daemon_that_began_it(house: House, browser: Browser) -> None:
    """A restarted daemon, or the one that took over, knows the session by its row."""
    session = browser.cookies[SESSION_COOKIE]
    async with TestClient(TestServer(build_api_app(house.parts))) as client:
        headers = {"Cookie": f"{SESSION_COOKIE}={session}", "Accept": "text/html"}
        async with client.get("/webhooks", headers=headers, allow_redirects=False) as answer:
            assert answer.status == 200


async def test_what_has_expired_is_cleared_away(house: House, browser: Browser) -> None:
    await house.db.execute("UPDATE dispatcher.session SET expires_at = now() - interval '1 second'")
    await SessionStore(house.db).begin(house.key_ids["acme"])
    assert await house.db.fetchval("SELECT count(*) FROM dispatcher.session") == 1


# -- forms


@pytest.mark.parametrize("token", ["", "0" * 64, "ümlaut", "{rival}"])
async def test_a_form_without_the_session_s_own_token_is_refused(
    house: House, browser: Browser, rival: Browser, token: str
) -> None:
    webhook = await house.webhook()
    answer = await browser.post(f"/webhooks/{webhook['id']}/pause", token=token.format(rival=rival.token))
    assert answer.status == 403
    assert await house.db.fetchval("SELECT status FROM dispatcher.endpoint") == "active"


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
     {"Sec-Fetch-Site": "same-site"}, {"Origin": "http://127.0.0.1:1"}],
)  # fmt: skip
async def test_a_form_from_elsewhere_is_refused_even_with_the_token(
    house: House, browser: Browser, headers: dict[str, str]
) -> None:
    webhook = await house.webhook()
    answer = await browser.post(f"/webhooks/{webhook['id']}/pause", **headers)
    assert answer.status == 403
    assert await house.db.fetchval("SELECT status FROM dispatcher.endpoint") == "active"


async def test_a_proxy_may_name_the_host_that_the_browser_sees(house: House, browser: Browser) -> None:
    webhook = await house.webhook()
    headers = {"Origin": "https://hooks.example", "X-Forwarded-Host": "hooks.example"}
    assert (await browser.post(f"/webhooks/{webhook['id']}/pause", **headers)).status == 303


async def test_signing_in_needs_a_token_too(house: House, stranger: Browser) -> None:
    await stranger.get("/sign-in")
    answer = await stranger.post("/sign-in", {"key": house.keys["acme"]}, token="0" * 64)
    assert answer.status == 403
    assert SESSION_COOKIE not in stranger.cookies
    assert GUEST_COOKIE in stranger.cookies


@pytest.mark.parametrize("path", ["/", "/sign-in", "/webhooks", "/webhooks/new"])
async def test_every_form_that_changes_something_bears_a_token(house: House, browser: Browser, path: str) -> None:
    if path == "/sign-in":
        await browser.post("/sign-out")
    await house.webhook()
    forms = re.findall(r"<form[^>]*method=\"post\".*?</form>", (await browser.get(path)).text, re.DOTALL)
    assert forms
    assert all('name="csrf"' in form for form in forms)


async def test_nothing_is_changed_by_a_link(house: House, browser: Browser) -> None:
    webhook = await house.webhook()
    for below in ("pause", "resume", "secret"):
        assert (await browser.get(f"/webhooks/{webhook['id']}/{below}")).status == 405
    assert await house.db.fetchval("SELECT status FROM dispatcher.endpoint") == "active"


async def test_a_form_as_json_is_refused(browser: Browser) -> None:
    async with browser.client.post("/sign-out", json={"csrf": browser.token}) as answer:
        assert answer.status == 415


def test_addresses_of_one_household_count_as_one() -> None:
    door = Door(SessionStore(None))
    first, second = (make_mocked_request("POST", "/sign-in") for _ in range(2))
    waits = []
    for place, request in enumerate([first, second] * 15):
        waits.append(door.count_attempt(request.clone(remote=f"2001:db8::{place + 1:x}")))
    assert sum(wait > 0 for wait in waits) == 10
    assert door.count_attempt(first.clone(remote="2001:db8:1::1")) == 0
