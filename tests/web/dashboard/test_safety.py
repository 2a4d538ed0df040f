"""What pages must never do: run what others wrote, show what is another account's, be framed, be kept."""

from __future__ import annotations

import html.parser
import re
from typing import TYPE_CHECKING, Any

import pytest

from dispatcher.core.attempt import Attempt
from dispatcher.model import Result
from dispatcher.web.dashboard.rendering import POLICY

if TYPE_CHECKING:
    from tests.web.dashboard.conftest import Browser, House

MARK = "xss7"
EVIL = f"\"'><script>{MARK}()</script><img src=x onerror={MARK}()>"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
OF_WEBHOOK = ["", "/deliveries", "/test", "/replay", "/edit", "/rotate", "/delete"]


class Elements(html.parser.HTMLParser):
    """The elements that a browser sees in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def assert_tame(text: str) -> None:
    """Nothing on the page runs but our own modules, and nothing comes from elsewhere."""
    tags = Elements(text).tags
    assert tags
    for tag, attributes in tags:
        names = set(attributes)
        assert not any(name.startswith("on") for name in names), (tag, attributes)
        assert "style" not in names, (tag, attributes)
        assert tag not in {"style", "iframe", "object", "embed", "base", "img"}, (tag, attributes)
        if tag in {"script", "link"}:
            target = attributes.get("src") or attributes.get("href") or ""
            assert target.startswith("/assets/"), attributes
        for name in ("href", "action", "formaction"):
            target = attributes.get(name) or "/"
            assert re.match(r"[/?#]", target), (tag, attributes)
            assert not target.startswith("//"), (tag, attributes)


async def evil_account(house: House) -> dict[str, Any]:
    """A webhook, events and deliveries of which everything that others write is evil."""
    webhook = await house.webhook(
        url=f"https://example.com/{MARK}?q=<script>{MARK}()</script>'\"",
        description=EVIL,
        events=["*"],
        headers={"X-Evil": EVIL},
    )
    event = await house.event(EVIL, f'{{"evil": "<script>{MARK}()</script>"}}')
    await house.attempt(
        webhook["id"],
        event,
        "exhausted",
        error=EVIL,
        response_head=f"HTTP/1.1 500 {EVIL}\r\nX-Evil: {EVIL}\r\n".encode(),
        response_body=EVIL.encode(),
    )
    await house.attempt(webhook["id"], await house.event(EVIL), "retrying", error=EVIL)
    endpoint = "SELECT id FROM dispatcher.endpoint"
    await house.db.execute(
        f"INSERT INTO dispatcher.endpoint_health (endpoint_id, failing_since, last_error)"
        f" VALUES (({endpoint}), now() - interval '1 hour', $1)",
        EVIL,
    )
    return webhook


# -- nothing of others runs


@pytest.mark.parametrize("path", ["/", "/webhooks", *(f"/webhooks/{{id}}{below}" for below in OF_WEBHOOK)])
async def test_what_others_wrote_is_text(house: House, browser: Browser, path: str) -> None:
    webhook = await evil_account(house)
    page = await browser.get(path.format(id=webhook["id"]))
    assert page.status == 200
    assert MARK in page.text
    assert_tame(page.text)


@pytest.mark.parametrize(
    "path",
    ["/sign-in?next={}", "/webhooks?q={}&status={}", "/webhooks/{}", "/nowhere/{}", "/webhooks/new?events={}",
     "/webhooks?note={}", "/deliveries/{}", "/events?type={}"],
)  # fmt: skip
async def test_what_an_address_says_is_text(house: House, browser: Browser, path: str) -> None:
    page = await browser.get(path.replace("{}", "%22%27%3E%3Cscript%3Exss7()%3C/script%3E"))
    if page.status != 303:
        assert_tame(page.text)
    assert f"<script>{MARK}" not in page.text


async def test_what_a_form_says_comes_back_as_text(house: House, browser: Browser) -> None:
    fields = dict.fromkeys(
        ["url", "description", "events", "events_more", "headers", "body_style", "retry", "retry_custom", "rate_limit",
         "max_concurrency", "timeout_s", "version", "signing", "secret"],
        EVIL,
    )  # fmt: skip
    page = await browser.post("/webhooks/new", fields)
    assert page.status == 422
    assert_tame(page.text)
    webhook = await house.webhook()
    for below, form in (
        ("test", {"type": EVIL, "data": EVIL}),
        ("replay", {"since": EVIL, "until": EVIL, "types": EVIL, "status": EVIL}),
        ("rotate", {"signing": "own", "secret": EVIL + "\n", "grace_s": EVIL}),
        ("edit", fields),
    ):
        page = await browser.post(f"/webhooks/{webhook['id']}/{below}", form)
        assert page.status == 422, page.words
        assert_tame(page.text)


async def test_what_an_endpoint_answers_to_a_test_is_text(house: House, browser: Browser) -> None:
    webhook = await house.webhook()
    house.endpoint.answers = [
        Attempt(
            Result.SERVER_ERROR,
            status=500,
            head=f"HTTP/1.1 500 No\r\nX-{MARK}: {EVIL}\r\n\r\n".encode(),
            body=EVIL.encode(),
        )
    ]
    page = await browser.post(f"/webhooks/{webhook['id']}/test", {"type": "email.sent", "data": "{}"})
    assert page.status == 200
    assert MARK in page.text
    assert_tame(page.text)


# -- headers


@pytest.mark.parametrize("path", ["/", "/sign-in", "/webhooks", "/webhooks/new", "/nowhere", "/webhooks/wh_none"])
async def test_every_page_bears_the_headers(browser: Browser, path: str) -> None:
    if path == "/sign-in":
        await browser.post("/sign-out")
    page = await browser.get(path)
    assert {name: page.headers.get(name) for name in HEADERS} == HEADERS
    assert "Server" not in page.headers


def test_the_policy_lets_nothing_inline_and_nothing_from_elsewhere() -> None:
    policy = dict(part.strip().split(" ", 1) for part in POLICY.split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert "unsafe" not in POLICY
    assert not re.search(r"https?:|\*", POLICY)


async def test_files_are_kept_for_ever_under_the_address_that_names_their_version(browser: Browser) -> None:
    page = await browser.get("/sign-in")
    page = await browser.get("/")
    paths = re.findall(r'"(/assets/[^"]+)"', page.text)
    assert len(paths) >= 3
    for path in paths:
        file = await browser.get(path)
        assert (file.status, file.headers["Cache-Control"]) == (200, "public, max-age=31536000, immutable")
        assert file.headers["X-Content-Type-Options"] == "nosniff"
        again = await browser.get(path, **{"If-None-Match": file.headers["ETag"]})
        assert (again.status, again.text) == (304, "")


@pytest.mark.parametrize("name", ["nothing.css", "../api.py", "%2e%2e/api.py", "dashboard.css.bak", "Dashboard.css"])
async def test_there_are_no_other_files(browser: Browser, name: str) -> None:
    version = re.findall(r"/assets/([0-9a-f]+)/", (await browser.get("/")).text)[0]
    assert (await browser.get(f"/assets/{version}/{name}")).status == 404


async def test_another_version_is_never_kept(browser: Browser) -> None:
    file = await browser.get("/assets/000000000000/dashboard.css")
    assert (file.status, file.headers["Cache-Control"]) == (200, "no-cache")


# -- nothing of another account


@pytest.mark.parametrize("below", OF_WEBHOOK)
async def test_another_account_s_webhook_is_not_there(house: House, rival: Browser, below: str) -> None:
    webhook = await house.webhook()
    for webhook_id in (webhook["id"], "wh_none"):
        page = await rival.get(f"/webhooks/{webhook_id}{below}")
        assert page.status == 404
        assert "example.com" not in page.text


@pytest.mark.parametrize(
    ("below", "form"),
    [("pause", {}), ("resume", {}), ("secret", {}), ("delete", {}), ("rotate", {"signing": "new", "grace_s": "0"}),
     ("edit", {"url": "https://evil.example/", "events": "*", "version": "1"}), ("style", {"style": "python"}),
     ("test", {"type": "email.sent", "data": "{}"}), ("replays/rpl_1/cancel", {}),
     ("replay", {"since": "2026-01-01T00:00", "status": "all", "act": "begin"})],
)  # fmt: skip
async def test_nor_can_it_be_changed(house: House, rival: Browser, below: str, form: dict[str, str]) -> None:
    webhook = await house.webhook()
    before = await house.db.fetchrow("SELECT * FROM dispatcher.endpoint")
    page = await rival.post(f"/webhooks/{webhook['id']}/{below}", form)
    assert page.status == 404
    assert webhook["secret"] not in page.text
    assert await house.db.fetchrow("SELECT * FROM dispatcher.endpoint") == before
    assert not house.endpoint.trials
    assert await house.db.fetchval("SELECT count(*) FROM dispatcher.replay") == 0


async def test_the_overview_and_the_list_are_of_one_account(house: House, browser: Browser, rival: Browser) -> None:
    webhook = await house.webhook(description="quite private")
    await house.attempt(webhook["id"], await house.event("private.thing"), "delivered")
    await house.pending(webhook["id"], await house.event("private.other"))
    for path in ("/", "/webhooks", "/webhooks?q=private"):
        mine, theirs = await browser.get(path), await rival.get(path)
        assert webhook["id"] in mine.text
        assert webhook["id"] not in theirs.text
        assert "private" not in theirs.words
    assert "private. thing" in (await browser.get("/")).words


async def test_a_secret_is_shown_only_when_asked_for(house: House, browser: Browser) -> None:
    webhook = await house.webhook()
    for path in ("/", "/webhooks", *(f"/webhooks/{webhook['id']}{below}" for below in OF_WEBHOOK)):
        assert webhook["secret"] not in (await browser.get(path)).text
    page = await browser.post(f"/webhooks/{webhook['id']}/secret")
    assert webhook["secret"] in page.text
    assert page.headers["Cache-Control"] == "no-store"


# -- errors


@pytest.mark.parametrize("path", ["/nowhere", "/webhooks/wh_none", "/webhooks/%00", "/webhooks/" + "x" * 200])
async def test_what_is_not_there_is_a_page_with_a_way_on(browser: Browser, path: str) -> None:
    page = await browser.get(path)
    assert page.status == 404
    assert page.headers["Content-Type"].startswith("text/html")
    assert 'href="/webhooks"' in page.text


async def test_programs_are_told_in_json(browser: Browser) -> None:
    page = await browser.get("/nowhere", Accept="*/*")
    assert page.headers["Content-Type"].startswith("application/problem+json")
    page = await browser.get("/v1/nowhere")
    assert page.headers["Content-Type"].startswith("application/problem+json")


async def test_a_fault_of_ours_tells_nothing_but_where_it_was_logged(
    house: House, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> None:
        raise RuntimeError("tp_live_secret of the inside")

    assert house.parts.stores is not None
    monkeypatch.setattr(house.parts.stores.overview, "webhooks", fail)
    page = await browser.get("/webhooks")
    assert page.status == 500
    assert "inside" not in page.text
    assert page.headers["X-Request-Id"] in page.words


async def test_without_the_database_there_is_still_a_page(
    house: House, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any) -> None:
        raise ConnectionRefusedError

    assert house.parts.stores is not None
    monkeypatch.setattr(house.parts.stores.sessions, "find", away)
    page = await browser.get("/")
    assert page.status == 503
    assert page.headers["Retry-After"]
    assert "Try again shortly" in page.words
