"""Pictures of the dashboard: those of the README, or with `--all [NAME…] DIRECTORY` every page, or some, in every size.

Run it by hand: python tests/browser/screenshots.py
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, Page
from scene import Scene, build
from stage import OPERATOR_KEY, Stage, browser, chromium, stage

from dispatcher.embedded import EmbeddedPostgres
from dispatcher.store.schema import migrate

SHOWN = ("overview", "webhook", "delivery", "event-type")
README = Path(__file__).parents[2] / "config" / "screenshots"
WIDE, NARROW, SHOWN_SIZE = (1440, 900), (360, 740), (1200, 780)

# A day that there was no time for: a wave of deliveries, some of which failed first.
HISTORY = """
    INSERT INTO dispatcher.attempt (at, event_seq, event_xid, endpoint_id, generation, attempt, state, result, status,
                                    duration_us)
    SELECT now() - n * interval '90 seconds', o.seq, o.xid, e.id, nextval('dispatcher.generation_seq'), 1,
           CASE WHEN n % 23 = 0 THEN 'retrying' WHEN n % 61 = 0 THEN 'exhausted' ELSE 'delivered' END,
           CASE WHEN n % 23 = 0 OR n % 61 = 0 THEN '5xx' ELSE '2xx' END,
           CASE WHEN n % 23 = 0 OR n % 61 = 0 THEN 502 ELSE 200 END,
           (40000 + 25000 * sin(n / 40.0) + 30000 * random() ^ 4)::integer
    FROM generate_series(2, 960) n CROSS JOIN dispatcher.endpoint e
    CROSS JOIN LATERAL (SELECT seq, xid FROM dispatcher.outbox ORDER BY seq OFFSET n % 30 LIMIT 1) o
    CROSS JOIN LATERAL generate_series(1, (2 + 2 * sin(n / 25.0) + random())::integer) copies
    WHERE e.public_id = $1
"""


async def main(arguments: list[str]) -> None:
    """Set the scene, and look at it."""
    executable = chromium()
    if executable is None:
        sys.exit("there is no chromium on this machine")
    every, given = "--all" in arguments, [argument for argument in arguments if argument != "--all"]
    directory = Path(given.pop()) if every else README
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as state:
        async with EmbeddedPostgres(Path(state) / "postgres", None, ephemeral=True) as server:
            await migrate(server.dsn)
            async with stage(server.dsn, Path(state)) as here, browser(executable) as running:
                scene = await build(here)
                await here.pool.execute(HISTORY, scene.good["id"])
                chosen = given or ([*scene.pages(), "operator"] if every else SHOWN)
                for theme in ("light", "dark"):
                    for size in (WIDE, NARROW) if every else (SHOWN_SIZE,):
                        page = await _enter(running, here, theme, size)
                        for name in chosen:
                            await _open(page, here, scene, name)
                            suffix = f"-{size[0]}" if every else ""
                            await page.screenshot(path=directory / f"{name}-{theme}{suffix}.png", full_page=every)


async def _enter(running: Browser, here: Stage, theme: Any, size: tuple[int, int]) -> Page:
    page = await running.new_page(
        viewport={"width": size[0], "height": size[1]}, color_scheme=theme, timezone_id="Europe/Berlin"
    )
    await page.goto(f"{here.url}/sign-in")
    await page.fill("#key", here.key)
    await page.click("button.wide")
    return page


async def _open(page: Page, here: Stage, scene: Scene, name: str) -> None:
    if name != "operator":
        await page.goto(here.url + scene.pages()[name])
        return
    await page.goto(f"{here.url}/operator")
    if await page.locator("#key").count():
        await page.fill("#key", OPERATOR_KEY)
        await page.click("button.wide")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
