"""The operator's page in a real browser: it keeps itself up to date, and account pages stay closed."""

from __future__ import annotations

import pytest
from conftest import Window
from playwright.async_api import expect
from stage import OPERATOR_KEY, Stage

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_the_operator_looks_in_and_sees_accounts_come(stranger: Window, stage: Stage):
    page = await stranger.open("/operator")
    await page.get_by_label("Operator key").fill(OPERATOR_KEY)
    await page.get_by_role("button", name="Open").click()
    await expect(page.get_by_role("heading", name="Installation")).to_be_visible()
    await expect(page.locator("#instances-table")).to_contain_text("active")
    await expect(page.get_by_text("operator_key", exact=True)).to_be_visible()
    assert OPERATOR_KEY not in await page.content()
    await stage.pool.execute("INSERT INTO dispatcher.account (name) VALUES ('aardvark')")
    await expect(page.locator("tr[data-key=aardvark]")).to_be_visible()
    await stranger.open("/events")
    assert page.url.startswith(f"{stage.url}/sign-in")
    await stranger.open("/operator")
    await page.get_by_role("button", name="Close").click()
    await expect(page.get_by_label("Operator key")).to_be_visible()
