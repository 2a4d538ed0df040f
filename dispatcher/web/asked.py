"""What several calls ask for in the same way: moments in time, and bodies that may be left out."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final, TypeVar

import msgspec
from aiohttp import web

from dispatcher.web.answers import ID_FORM, no_query
from dispatcher.web.bodies import Check, read_body
from dispatcher.web.problems import FieldError, invalid

ID: Final = f"{{id:{ID_FORM}}}"  # in a path: the first thing that it names
WEBHOOK: Final = f"/webhooks/{ID}"

A_MOMENT: Final = 'a time with its zone, like "2025-01-15T10:30:00Z"'

T = TypeVar("T", bound=msgspec.Struct)


def read_moment(text: str) -> datetime | None:
    """The moment that this is in RFC 3339; None if it is none, or in a year that PostgreSQL or we cannot hold."""
    try:
        at = msgspec.convert(text.replace(" ", "+"), datetime)  # a plus sign in a query is a blank, unless escaped
        return at.astimezone(UTC) if at.tzinfo is not None and 1970 <= at.year < 9998 else None
    except (msgspec.ValidationError, OverflowError):
        return None


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
