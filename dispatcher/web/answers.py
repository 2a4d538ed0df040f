"""Answers, and the lists among them.

A list is newest first: `limit` (20, at most 100) and at most one of `after` and `before`, both ids of that list, ask
for a part of it. The answer is `{"data": […], "has_more": …, "next": …}`, where `next` is what to put into the same
parameter to go on in the same direction: older with `after` (or neither), newer with `before`. Nothing is counted and
nothing is skipped over, so page 1000 costs what page 1 does; and since a cursor is the id where the last page ended, it
stays good while events come in.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Protocol, TypeVar

import msgspec
from aiohttp import web

from dispatcher.web.problems import FieldError, invalid

LIMIT: Final = 20
LIMIT_MAX: Final = 100

ID_FORM: Final = "[A-Za-z0-9_-]{1,64}"
is_id: Final = re.compile(ID_FORM).fullmatch
"""Whether a text can be the id of anything, and so a place in a list."""

_is_limit: Final = re.compile(r"[0-9]{1,3}").fullmatch


class Identified(Protocol):
    """What can stand in a list."""

    @property
    def id(self) -> str:
        """By which it is sorted."""


Entry = TypeVar("Entry", bound=Identified)


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """The part of a list that is asked for."""

    limit: int
    after: str | None
    before: str | None
    filters: Mapping[str, str]


def answer(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """`document` as JSON."""
    return web.Response(
        body=msgspec.json.encode(document), status=status, content_type="application/json", headers=headers
    )


def page(data: Sequence[Any], next_cursor: str | None) -> web.Response:
    """A part of a list; `next_cursor` is None when nothing follows."""
    return answer({"data": data, "has_more": next_cursor is not None, "next": next_cursor})


def cut(found: Sequence[Entry], wanted: Wanted) -> tuple[Sequence[Entry], str | None]:
    """What was found with a limit one larger than wanted, without the one too many, and the cursor to go on from."""
    if len(found) <= wanted.limit:
        return found, None
    if wanted.before is not None:
        return found[1:], found[1].id
    return found[:-1], found[-2].id


def moment(at: datetime | None) -> str | None:
    """A time in UTC and whole seconds, as the events themselves spell theirs."""
    return None if at is None else f"{at.astimezone(UTC).replace(tzinfo=None, microsecond=0).isoformat()}Z"


def no_query(request: web.Request) -> None:
    """Refuse every parameter, since none has a meaning. Raises Problem."""
    check_query(request)


def check_query(request: web.Request, *known: str) -> None:
    """Refuse parameters other than these, and any that is given twice. Raises Problem."""
    _check_names(request, known)


def wanted(request: web.Request, *filters: str, prefix: str = "") -> Wanted:
    """The part of a list that the query asks for. Raises Problem for parameters that are unknown or make no sense.

    `prefix` is what the ids of the list begin with, if all of them do: applications may name their own events.
    """
    _check_names(request, ("limit", "after", "before", *filters))
    query, errors = request.query, []
    limit = query.get("limit", str(LIMIT))
    if not _is_limit(limit) or not 1 <= int(limit) <= LIMIT_MAX:
        errors.append(FieldError("limit", f"expected a whole number from 1 to {LIMIT_MAX}"))
    errors += (
        FieldError(name, "expected what `next` of a page was, or the id of an entry")
        for name in ("after", "before")
        if name in query and not (is_id(query[name]) and query[name].startswith(prefix))
    )
    if "after" in query and "before" in query:
        errors.append(FieldError("before", "cannot be combined with after"))
    if errors:
        raise invalid(errors)
    given = {name: query[name] for name in filters if name in query}
    return Wanted(int(limit), query.get("after"), query.get("before"), given)


def _check_names(request: web.Request, known: Sequence[str]) -> None:
    expected = f"expected one of {', '.join(known)}" if known else "there are none here"
    errors = []
    for name in dict.fromkeys(request.query):
        if name not in known:
            errors.append(FieldError(ascii(name[:40])[1:-1], f"is not a parameter: {expected}"))
        elif len(request.query.getall(name)) > 1:
            errors.append(FieldError(name, "is given twice"))
    if errors:
        raise invalid(errors)
