"""Pictures of the dashboard: `python tests/browser/screenshots.py` makes those of the README, `--all DIRECTORY` every page."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from scene import Scene, build
from stage import OPERATOR_KEY, Stage, browser, chromium, stage

from dispatcher.embedded import EmbeddedPostgres
from dispatcher.store.database import migrate

SHOWN = ("overview", "webhook", "delivery", "event-type")
README = Path(__file__).parents[2] / "config" / "screenshots"
WIDE, NARROW = (1440, 900), (360, 740)


async def main(arguments: list[str]) -> None:
    """Set the scene, and look at it."""
    executable = chromium()
    if executable is None:
        sys.exit("there is no chromium on this machine")
    every, directory = "--all" in arguments, Path(arguments[-1]) if arguments else README
    chosen = [argument for argument in arguments[:-1] if argument != "--all"]
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as state:
        async with EmbeddedPostgres(Path(state) / "postgres", None, ephemeral=True) as server:
            await migrate(server.dsn)
            async with stage(server.dsn, Path(state)) as here:
                scene = await build(here)
                for theme in ("light", "dark"):
                    for size in (WIDE, NARROW) if every else (WIDE,):
                        await shoot(executable, here, scene, directory, theme, size, every=every, chosen=chosen)


async def shoot(
    executable: str,
    here: Stage,
    scene: Scene,
    directory: Path,
    theme: str,
    size: tuple[int, int],
    *,
    every: bool,
    chosen: list[str],
) -> None:
    """One pass through the pages."""
    async with browser(executable) as running:
        page = await running.new_page(
            viewport={"width": size[0], "height": size[1]}, color_scheme=theme, timezone_id="Europe/Berlin"
        )
        await page.goto(f"{here.url}/sign-in")
        if every:
            await page.screenshot(path=directory / f"sign-in-{theme}-{size[0]}.png")
        await page.fill("#key", here.key)
        await page.click("button.wide")
        pages = scene.pages()
        for name, path in pages.items():
            if (chosen and name not in chosen) or not (every or name in SHOWN):
                continue
            await page.goto(here.url + path)
            suffix = f"-{size[0]}" if every else ""
            await page.screenshot(path=directory / f"{name}-{theme}{suffix}.png", full_page=every)
        if every and (not chosen or "operator" in chosen):
            await page.goto(f"{here.url}/operator")
            await page.fill("#key", OPERATOR_KEY)
            await page.click("button.wide")
            await page.screenshot(path=directory / f"operator-{theme}-{size[0]}.png", full_page=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
