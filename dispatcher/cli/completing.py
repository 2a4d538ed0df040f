"""What a shell may offer behind an option or argument: event types, webhooks, profiles.

Completion must never disturb: whatever goes wrong, and whatever takes long, nothing is offered.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final

import click
from click.shell_completion import CompletionItem, get_completion_class

WAIT_S: Final = 2.0  # for the API, while somebody waits for their shell
WEBHOOKS_MAX: Final = 100


def event_types(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The built-in types, each with what it means."""
    from dispatcher.core.catalogue import Catalogue

    return [CompletionItem(t.name, help=t.description) for t in Catalogue.builtin() if t.name.startswith(incomplete)]


def event_filters(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What can stand in a webhook's `events`, behind the last comma of a list."""
    from dispatcher.core.catalogue import Catalogue

    told = {each.name: each.description for each in Catalogue.builtin()}
    prefixes = {f"{name.partition('.')[0]}.*": "all of these" for name in told}
    before, comma, last = incomplete.rpartition(",")
    given = before.split(",")
    return [
        CompletionItem(f"{before}{comma}{name}", help=meaning)
        for name, meaning in ({"*": "everything"} | prefixes | told).items()
        if name.startswith(last) and name not in given
    ]


def webhook_ids(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The account's webhooks, the newest ones."""
    import asyncio

    found: list[Any] = []
    with contextlib.suppress(Exception):
        found = asyncio.run(asyncio.wait_for(_webhooks(context.params), WAIT_S))
    return [CompletionItem(w["id"], help=w["url"]) for w in found if w["id"].startswith(incomplete)]


async def _webhooks(given: dict[str, Any]) -> list[Any]:
    from dispatcher.cli.client import Api
    from dispatcher.cli.profiles import find_access

    access = find_access(url=given.get("api_url"), key=given.get("api_key"), profile=given.get("profile"))
    async with Api(access.url, access.key) as api:
        page = await api.call("GET", "webhooks", query={"limit": WEBHOOKS_MAX})
    webhooks: list[Any] = page["data"]
    return webhooks


def profiles(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The stored logins."""
    from dispatcher.cli.profiles import read_profiles

    stored: dict[str, dict[str, str]] = {}
    with contextlib.suppress(Exception):
        stored = read_profiles()
    return [CompletionItem(name, help=it.get("url")) for name, it in stored.items() if name.startswith(incomplete)]


def script(program: click.Command, name: str, shell: str) -> str:
    """What teaches `shell` (bash, zsh, fish) to complete the command line `name`."""
    found = get_completion_class(shell)
    assert found is not None, "click knows these shells"
    return found(program, {}, name, f"_{name.upper()}_COMPLETE").source()
