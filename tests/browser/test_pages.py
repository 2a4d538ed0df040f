"""Every page, light and dark, wide and narrow: accessible by the rules of axe-core, and never wider than its window."""

from __future__ import annotations

from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe
from conftest import NARROW, WIDE, Window, stranger_in
from playwright.async_api import Browser, ViewportSize
from scene import Scene
from stage import OPERATOR_KEY, Stage

pytestmark = pytest.mark.asyncio(loop_scope="session")

ALL = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
CONTRAST = {"runOnly": {"type": "rule", "values": ["color-contrast"]}}
ALL_BUT_CONTRAST = ALL | {"rules": {"color-contrast": {"enabled": False}}}
UNFOLD = """
    for (const details of document.querySelectorAll("details")) {
        details.removeAttribute("name");
        details.open = true;
    }
"""
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
OUT_OF_SIGHT = """() => [...document.querySelectorAll("main :is(button, .button, .tabs a)")]
    .filter((one) => one.checkVisibility() && one.getBoundingClientRect().right > innerWidth)
    .map((one) => one.textContent.trim())
"""


async def look(window: Window, path: str, rules: dict[str, Any]) -> list[str]:
    """What is wrong with a page when all of it is unfolded."""
    page = await window.open(path)
    await page.evaluate(UNFOLD)
    found = await Axe().run(page, options=rules)
    wrong = [
        f"{path}: {one['id']}: {node['target']} {node['failureSummary']}"
        for one in found.response["violations"]
        for node in one["nodes"]
    ]
    wrong += [f"{path}: {name} is out of sight" for name in await page.evaluate(OUT_OF_SIGHT)]
    wider = await page.evaluate(WIDER)
    return [*wrong, f"{path}: {wider} px wider than the window"] if wider > 0 else wrong


# Contrast is the slowest of the rules, and differs by theme alone; the others differ by what there is room for.
@pytest.mark.parametrize(
    "seen",
    [("light", WIDE, ALL), ("dark", WIDE, CONTRAST), ("dark", NARROW, ALL_BUT_CONTRAST)],
    ids=["light", "dark", "narrow"],
)
async def test_every_page_is_accessible_and_fits(
    chromium: Browser, stage: Stage, scene: Scene, seen: tuple[Any, ViewportSize, dict[str, Any]]
):
    theme, size, rules = seen
    async with stranger_in(chromium, stage, color_scheme=theme) as window:
        await window.page.set_viewport_size(size)
        wrong = [*await look(window, "/sign-in", rules), *await look(window, "/operator/sign-in", rules)]
        await window.page.get_by_label("Operator key").fill(OPERATOR_KEY)
        await window.page.get_by_role("button", name="Open").click()
        await window.page.wait_for_url("**/operator")
        wrong += await look(window, "/operator", rules)
        await window.sign_in(stage.key)
        for path in scene.pages().values():
            wrong += await look(window, path, rules)
    assert not wrong, "\n".join(wrong)


async def test_a_long_address_leaves_the_rest_of_a_page_in_sight(window: Window, stage: Stage):
    webhook = await stage.webhook("/ok/" + "long-" * 300, events=["long.*"], description="long" * 200)
    await window.page.set_viewport_size(NARROW)
    for path in (f"/webhooks/{webhook['id']}", f"/webhooks?q={webhook['id']}", f"/webhooks/{webhook['id']}/edit"):
        page = await window.open(path)
        assert await page.evaluate(WIDER) <= 0, path
        first = page.locator("main :is(.tabs, tbody .badge, #url)").first
        box = await first.bounding_box()
        assert box is not None, path
        assert box["y"] < NARROW["height"], path
        assert box["x"] + box["width"] <= NARROW["width"], path


async def test_the_theme_is_the_systems_until_somebody_chooses(stranger: Window):
    page = await stranger.open("/no-such-page")
    ground = "getComputedStyle(document.body).backgroundColor"
    await page.emulate_media(color_scheme="light")
    light = await page.evaluate(ground)
    await page.emulate_media(color_scheme="dark")
    dark = await page.evaluate(ground)
    assert light != dark
    await page.emulate_media(color_scheme="light")
    await page.get_by_role("button", name="Dark", exact=True).click()
    assert await page.evaluate(ground) == dark
    await page.reload()
    assert await page.evaluate(ground) == dark, "the choice is remembered"
    await page.get_by_role("button", name="Light", exact=True).click()
    assert await page.evaluate(ground) == light


async def test_times_are_the_readers_with_utc_on_hover(window: Window, scene: Scene):
    page = await window.open(f"/deliveries/{scene.delivered}")
    shown = page.locator("time[data-time=seconds]").first
    text, (moment, title) = await shown.inner_text(), [await shown.get_attribute(it) for it in ("datetime", "title")]
    assert moment is not None
    assert title is not None
    local = await page.evaluate("at => new Date(at).toLocaleTimeString('en-GB', { timeZone: 'Europe/Berlin' })", moment)
    assert text.endswith(local)
    assert title.endswith("UTC")
    assert moment[11:19] in title


async def test_nothing_moves_while_a_page_loads(window: Window, scene: Scene):
    """No layout shift: what is drawn first stays where it is."""
    for path in ("/", "/events", f"/deliveries/{scene.delivered}"):
        page = await window.open(path)
        shift = await page.evaluate(
            """() => new Promise((resolve) => {
                let sum = 0;
                new PerformanceObserver((list) => { for (const one of list.getEntries()) sum += one.value; })
                    .observe({ type: "layout-shift", buffered: true });
                requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(() => resolve(sum), 100)));
            })"""
        )
        assert shift < 0.02, path
