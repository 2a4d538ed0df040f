"""One daemon and one browser for all tests here; each has a window, an account's session and webhooks of its own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import scene as scenery
import stage as staging
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Page, expect

WIDE, NARROW = {"width": 1440, "height": 900}, {"width": 360, "height": 740}
PATIENCE_MS = 20_000

expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="session")
def executable() -> str:
    found = staging.chromium()
    if found is None:
        pytest.skip("there is no Chromium on this machine: install Debian's chromium, or let CHROMIUM name one")
    return found


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def chromium(executable: str) -> AsyncIterator[Browser]:
    async with staging.browser(executable) as running:
        yield running


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def stage(
    executable: str, administrator: Any, template: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[staging.Stage]:
    name = administrator.create(template)
    directory = tmp_path_factory.mktemp("daemon")
    async with staging.stage(administrator.dsn_of(name), directory, DISPATCHER_RETRY_SCHEDULE="1s,10m") as here:
        yield here
    administrator.drop(name)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def scene(stage: staging.Stage) -> scenery.Scene:
    return await scenery.build(stage)


class Window:
    """A browser's window on the dashboard; what goes wrong in it is kept."""

    def __init__(self, context: BrowserContext, page: Page, url: str) -> None:
        self.context = context
        self.page = page
        self.url = url
        self.troubles: list[str] = []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.troubles.append(str(error)))

    def _on_console(self, message: ConsoleMessage) -> None:
        # An answer of 4xx is logged as an error too, and is what some tests are about.
        if message.type == "error" and "the server responded with a status of 4" not in message.text:
            self.troubles.append(message.text)

    async def open(self, path: str) -> Page:
        await self.page.goto(self.url + path)
        return self.page

    async def sign_in(self, key: str) -> None:
        await self.open("/sign-in")
        await self.page.get_by_label("API key").fill(key)
        await self.page.get_by_role("button", name="Sign in").click()
        await self.page.wait_for_url(self.url + "/")

    async def close(self) -> None:
        await self.page.close()
        assert self.troubles == [], "nothing goes wrong in a window, and nothing is refused by the policy"


async def profile(chromium: Browser, **options: Any) -> BrowserContext:
    """A browser of somebody in Berlin who has not signed in."""
    context = await chromium.new_context(viewport=WIDE, timezone_id="Europe/Berlin", locale="en-GB", **options)
    context.set_default_timeout(PATIENCE_MS)
    return context


@contextlib.asynccontextmanager
async def stranger_in(chromium: Browser, stage: staging.Stage, **options: Any) -> AsyncIterator[Window]:
    """A window in a profile of its own; nobody is signed in."""
    context = await profile(chromium, **options)
    window = Window(context, await context.new_page(), stage.url)
    yield window
    await window.close()
    await context.close()


@pytest_asyncio.fixture(loop_scope="session")
async def stranger(chromium: Browser, stage: staging.Stage) -> AsyncIterator[Window]:
    async with stranger_in(chromium, stage) as window:
        yield window


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def signed_in(chromium: Browser, stage: staging.Stage) -> AsyncIterator[BrowserContext]:
    context = await profile(chromium)
    window = Window(context, await context.new_page(), stage.url)
    await window.sign_in(stage.key)
    await window.close()
    yield context
    await context.close()


@pytest_asyncio.fixture(loop_scope="session")
async def window(signed_in: BrowserContext, stage: staging.Stage) -> AsyncIterator[Window]:
    """A window that is signed in; all of these share their cookies."""
    window = Window(signed_in, await signed_in.new_page(), stage.url)
    yield window
    await window.close()
