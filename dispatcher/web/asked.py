"""What several calls ask for in the same way: moments in time, bodies that may be left out, and data to be sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Final, TypeVar

import msgspec
from aiohttp import web

from dispatcher.errors import Undeliverable
from dispatcher.web.answers import ID_FORM, no_query
from dispatcher.web.bodies import Check, read_body
from dispatcher.web.problems import FieldError, invalid

ID: Final = f"{{id:{ID_FORM}}}"  # in a path: the first thing that it names
WEBHOOK: Final = f"/webhooks/{ID}"

A_MOMENT: Final = 'a time with its zone, like "2025-01-15T10:30:00Z"'

BESIDE_BYTES: Final = 16 << 10  # what has to be rendered exactly takes half a microsecond for each

T = TypeVar("T", bound=msgspec.Struct)
U = TypeVar("U")

_beside = ThreadPoolExecutor(1, thread_name_prefix="render")


def read_moment(text: str) -> datetime | None:
    """The moment that this is in RFC 3339; None if it is none, or in a year that PostgreSQL or we cannot hold."""
    try:
        at = msgspec.convert(text.replace(" ", "+"), datetime)  # a plus sign in a query is a blank, unless escaped
        return at.astimezone(UTC) if at.tzinfo is not None and 1970 <= at.year < 9998 else None
    except (msgspec.ValidationError, OverflowError):
        return None


async def rendered(act: Callable[[str, bytes], U], kind: str, data: bytes) -> U:
    """What `act` makes of an event. Raises Problem for data that no webhook could be sent.

    What is large goes to a thread, one at a time: the loop delivers meanwhile.
    """
    try:
        if len(data) <= BESIDE_BYTES:
            return act(kind, data)
        return await asyncio.get_running_loop().run_in_executor(_beside, act, kind, data)
    except Undeliverable as reason:
        raise invalid([FieldError("data", str(reason))]) from None


def moments(filters: Mapping[str, str], *names: str) -> dict[str, datetime | None]:
    """Parameters that are moments, those not given as None. Raises Problem."""
    found = {name: read_moment(filters[name]) if name in filters else None for name in names}
    wrong = [name for name in names if name in filters and found[name] is None]
    if wrong:
        raise invalid([FieldError(name, f"expected {A_MOMENT}") for name in wrong])
    return found


class _Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """A body in which nothing can stand."""


async def nothing_said(request: web.Request) -> None:
    """Refuse parameters and members of a body, since none has a meaning. Raises Problem."""
    no_query(request)
    await read_optional_body(request, _Nothing)


async def read_optional_body(request: web.Request, kind: type[T], checks: Mapping[str, Check] | None = None) -> T:
    """The body as a `kind`; without one, a `kind` of which nothing was said. Raises Problem."""
    return await read_body(request, kind, checks) if request.can_read_body else kind()
