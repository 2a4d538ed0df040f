"""What the customer's commands share: finding the API, paging through lists, showing one thing, reading a secret."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Final

import click

from dispatcher.cli.completing import profiles
from dispatcher.cli.output import decoded, file_argument, for_programs, hint, print_json, print_record, warn

if TYPE_CHECKING:
    from dispatcher.cli.client import Api


LOOK_S: Final = 10.0  # for the entries of one page


def access_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options by which a command finds the API."""
    for option in (
        click.option(
            "--profile",
            metavar="NAME",
            shell_complete=profiles,
            help="Which stored login to use. [default: $TRACKPOST_PROFILE, else default]",
        ),
        click.option("--api-key", metavar="KEY", help="The API key. Shows in ps and in the shell's history."),
        click.option("--api-url", metavar="URL", help="Where the API is."),
    ):
        command = option(command)
    return command


def connected(act: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A command that asks the API: `act` gets it as its first argument."""

    @access_options
    @functools.wraps(act)
    def command(*args: Any, api_url: str | None, api_key: str | None, profile: str | None, **options: Any) -> None:
        import asyncio

        from dispatcher.cli.client import Api
        from dispatcher.cli.profiles import find_access

        access = find_access(url=api_url, key=api_key, profile=profile)
        api = Api(access.url, access.key)
        if api.is_exposed:
            warn(f"{api.url} is not https: whoever is in between can read your key")

        async def run() -> None:
            async with api:
                await act(api, *args, **options)

        asyncio.run(run())

    return command


def part(limit: int, after: str | None) -> dict[str, str | int]:
    """The query that asks for a part of a list."""
    return {"limit": limit, **({"after": after} if after else {})}


async def browse(
    api: Api, *path: str, query: dict[str, str | int], every: bool, as_json: bool
) -> dict[str, Any] | None:
    """A page of a list for people to see; with `every`, all that follow in one. None: it was printed, for programs."""
    from dispatcher.cli.client import PAGE_MAX

    if every:
        entries = _entries(api, *path, query={**query, "limit": PAGE_MAX})
        if for_programs(as_json):
            await _print_each(entries)
            return None
        return {"data": [entry async for entry in entries], "has_more": False, "next": None}
    page = await _filled(api, *path, query=query)
    if for_programs(as_json):
        print_json(page)
        return None
    return page


async def _filled(api: Api, *path: str, query: dict[str, str | int]) -> dict[str, Any]:
    """A page with as many entries as were asked for, if there are as many.

    With a filter, the API looks at some thousands at a time: a page of its may be short, or empty, with more behind it.
    """
    until = time.monotonic() + LOOK_S
    page: dict[str, Any] = await api.call("GET", *path, query=query)
    while page["has_more"] and len(page["data"]) < int(query["limit"]) and time.monotonic() < until:
        left = int(query["limit"]) - len(page["data"])
        more = await api.call("GET", *path, query={**query, "limit": left, "after": page["next"]})
        page = {**more, "data": [*page["data"], *more["data"]]}
    return page


async def _print_each(entries: AsyncIterator[Any]) -> None:
    """One document, entry by entry: a long list need not be in memory, and a reader who has enough ends it."""
    opening = '{"data":['
    async for entry in entries:
        click.echo(opening, nl=False)
        print_json(entry, on_one_line=True)
        opening = ","
    click.echo(f'{opening if opening != "," else ""}],"has_more":false,"next":null}}')


async def _entries(api: Api, *path: str, query: dict[str, str | int]) -> AsyncIterator[Any]:
    async for page in api.pages(*path, query=query):
        for entry in page["data"]:
            yield entry


def tell_more(page: Mapping[str, Any]) -> None:
    """Say how to go on, where a list does."""
    if page["has_more"]:
        hint(f"There {'are' if page['data'] else 'may be'} more: --after {page['next']}, or --all.")


def show_one(record: Mapping[str, Any], as_json: bool) -> None:
    """Print one thing."""
    if for_programs(as_json):
        print_json(record)
    else:
        print_record(record)


def read_secret(secret: str | None, file: str | None) -> str:
    """The secret of one of the two options; a file's last line break is not part of it."""
    if file is not None:
        return decoded(file_argument(file, "--secret-file"), "--secret-file").rstrip("\r\n")
    assert secret is not None, "one of them was given"
    warn("--secret shows in ps and in the shell's history; --secret-file does not")
    return decoded(os.fsencode(secret), "--secret")
