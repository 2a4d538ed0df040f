"""Every page, with something on it and with nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.web.dashboard.conftest import Browser, House

OF_WEBHOOK = ["", "/deliveries", "/test", "/replay", "/edit", "/rotate", "/delete"]


@pytest.mark.parametrize("path", ["/", "/webhooks", "/webhooks/new"])
async def test_a_page_of_an_empty_account(browser: Browser, path: str) -> None:
    page = await browser.get(path)
    assert page.status == 200, page.words


@pytest.mark.parametrize("below", OF_WEBHOOK)
async def test_a_page_of_a_webhook_to_which_nothing_was_sent(house: House, browser: Browser, below: str) -> None:
    webhook = await house.webhook()
    page = await browser.get(f"/webhooks/{webhook['id']}{below}")
    assert page.status == 200, page.words
    assert "example.com/hook" in page.words
