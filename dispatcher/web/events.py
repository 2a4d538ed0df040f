"""`/v1/events` and `/v1/event-types`: emitting over HTTP, and looking at what was emitted.

Data that no webhook could be sent is refused here at once, for the same reasons for which an event written by SQL ends
as discarded. What passes is stored as it was written, to the byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Final

import msgspec
from aiohttp import web

from dispatcher.core.catalogue import EventType
from dispatcher.core.rendering import TYPE_BYTES_MAX, check_data, is_type
from dispatcher.core.traces import is_traceparent
from dispatcher.store.events import EventRecord, IdempotencyConflict
from dispatcher.web.answers import answer, moment, no_query, page, wanted
from dispatcher.web.asked import ID, rendered
from dispatcher.web.auth import caller
from dispatcher.web.bodies import expecting, read_body
from dispatcher.web.openapi import PAGE, Answer, PageOf, Parameter, operation
from dispatcher.web.parts import Web
from dispatcher.web.problems import FieldError, Problem, invalid, not_found

KEY_HEADER: Final = "Idempotency-Key"

_is_idempotency_key: Final = re.compile(r"[ -~]{1,255}").fullmatch
_A_TYPE: Final = f'lower-case words joined by dots, like "email.delivered", at most {TYPE_BYTES_MAX} bytes'


class NewEvent(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/events. Any type that is well formed will do, as in SQL."""

    type: Annotated[str, expecting(_A_TYPE)]
    data: Annotated[msgspec.Raw, expecting("an object")]


class EventAnswer(msgspec.Struct, kw_only=True):
    """An event as its account reads it; `data` is null only for more of it than is ever sent."""

    id: str
    type: str
    created_at: str | None
    status: str  # accepted | discarded
    reason: str | None  # why it was discarded
    data: msgspec.Raw


_KEY: Final = Parameter(
    KEY_HEADER,
    "1 to 255 printable ASCII characters. Used again within 24 hours with the same type and data, the answer is the "
    "first event; with others it is 409.",
    {"type": "string", "pattern": "^[ -~]{1,255}$"},
    place="header",
)
_TRACE: Final = Parameter(
    "traceparent",
    "W3C Trace Context: the trace that the event belongs to. Subscribers get it with each delivery. What is none is "
    "ignored.",
    {"type": "string"},
    place="header",
)
_TYPE: Final = Parameter("type", "Only events of this type.", {"type": "string", "maxLength": TYPE_BYTES_MAX})


class Events:
    """The calls."""

    def __init__(self, parts: Web) -> None:
        self._web = parts

    def routes(self) -> list[web.RouteDef]:
        """Paths below /v1."""
        return [
            web.post("/events", self.create),
            web.get("/events", self.browse),
            web.get(f"/events/{ID}", self.get),
            web.get("/event-types", self.types),
        ]

    @operation(
        "Events",
        body=NewEvent,
        parameters=[_KEY, _TRACE],
        answers={
            201: Answer(EventAnswer, "The event is committed and will be delivered.", headers=("Location",)),
            200: Answer(EventAnswer, "The event that this Idempotency-Key made before.", headers=("Location",)),
        },
        problems=["idempotency_conflict"],
    )
    async def create(self, request: web.Request) -> web.Response:
        """Emit: 201 with the event, or 200 with the one that this Idempotency-Key made before."""
        no_query(request)
        key = _idempotency_key(request)
        body = await read_body(request, NewEvent, {"type": _check_type})
        data = bytes(body.data)
        await rendered(check_data, body.type, data)
        try:
            event, is_new = await self._web.events.emit(
                caller(request).account, body.type, data.decode(), key, traceparent=_traceparent(request)
            )
        except IdempotencyConflict as conflict:
            detail = f"This Idempotency-Key was used within 24 hours with another type or other data: {conflict}."
            raise Problem(409, "idempotency_conflict", detail) from None
        return answer(shown(event), 201 if is_new else 200, {"Location": f"/v1/events/{event.id}"})

    @operation("Events", parameters=[*PAGE, _TYPE], answers={200: PageOf(EventAnswer)})
    async def browse(self, request: web.Request) -> web.Response:
        """The account's events, newest first; `type` picks those of one type."""
        part = wanted(request, "type")
        type_ = part.filters.get("type")
        if type_ is not None and not is_type(type_):
            raise invalid([FieldError("type", f"expected {_A_TYPE}")])
        found = await self._web.events.list(
            caller(request).account, limit=part.limit, after=part.after, before=part.before, type=type_
        )
        return page([shown(event) for event in found.events], found.reached)

    @operation("Events", answers={200: EventAnswer})
    async def get(self, request: web.Request) -> web.Response:
        """One event."""
        no_query(request)
        event = await self._web.events.get(caller(request).account, request.match_info["id"])
        if event is None:
            raise not_found("event")
        return answer(shown(event))

    @operation("Event types", answers={200: PageOf(EventType)})
    async def types(self, request: web.Request) -> web.Response:
        """The catalogue, whole: it is as long as its files."""
        no_query(request)
        return page(list(self._web.catalogue), None)


def shown(event: EventRecord) -> EventAnswer:
    """An event as JSON tells it."""
    return EventAnswer(
        id=event.id,
        type=event.type,
        created_at=moment(event.created_at),
        status="accepted" if event.reason is None else "discarded",
        reason=event.reason,
        data=msgspec.Raw((event.data or "null").encode()),
    )


def _idempotency_key(request: web.Request) -> str | None:
    key = request.headers.get(KEY_HEADER)
    if key is not None and not _is_idempotency_key(key):
        raise invalid([FieldError(KEY_HEADER, "expected 1 to 255 printable ASCII characters")])
    return key


def _traceparent(request: web.Request) -> str | None:
    given = request.headers.get("traceparent", "")
    return given if is_traceparent(given) else None


def _check_type(text: str) -> Iterator[FieldError]:
    if not is_type(text):
        yield FieldError("type", f"expected {_A_TYPE}")
