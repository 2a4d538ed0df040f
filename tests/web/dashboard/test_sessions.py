from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.web.dashboard.conftest import Browser


async def test_a_key_opens(browser: Browser) -> None:
    page = await browser.get("/")
    assert page.status == 200
    assert "acme" in page.words
