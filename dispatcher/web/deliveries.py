"""`/v1/webhooks/{id}/deliveries` and `/v1/deliveries`: what became of each event at each webhook, and once more.

A delivery that is only in memory (just queued, or in flight for the first time) is in no list: it comes into sight when
it is settled or fails, after two seconds at the latest. So `status=in_flight` is a good question with an empty answer.

In a list `attempts` is how many there were; in a single delivery they stand themselves. `status` is the delivery's
state, `status_code` what the receiver answered last. A list begins with what waits for its first attempt; then comes
what changed last. Its cursors are opaque, ids of entries do as well, and what is attempted meanwhile moves to the
front.

Requests are not stored. What was sent is made again of the event and of the webhook as it is now, byte for byte the
same as long as its URL, headers and body style have not been changed: `webhook_changed` says whether they may have
been.
Signatures and the timestamp they cover are not made again.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

import msgspec
from aiohttp import web

from dispatcher.core.head import WITHHELD, fields_of, withheld
from dispatcher.core.ids import DELIVERY_PREFIX
from dispatcher.core.rendering import Payload, is_type
from dispatcher.errors import AddressRefused, Undeliverable
from dispatcher.model import DeliveryKey, DeliveryState, EndpointStatus, Result
from dispatcher.store.accounts import KeyOwner
from dispatcher.store.deliveries import AttemptRecord, DeliveryDetail, DeliveryFilter, DeliveryRecord, Place
from dispatcher.store.endpoints import EndpointRecord
from dispatcher.web.answers import Wanted, answer, moment, no_query, page, wanted
from dispatcher.web.asked import moments
from dispatcher.web.auth import caller
from dispatcher.web.openapi import PAGE, Answer, PageOf, Parameter, operation
from dispatcher.web.parts import Log, Web
from dispatcher.web.problems import FieldError, Problem, invalid, not_found

FILTERS: Final = ("status", "type", "since", "until", "status_class", "event_id")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_WAITING: Final = "w"  # in a cursor, in the place of the time of the last change

_DATE_TIME: Final = {"type": "string", "format": "date-time"}
_FILTERS: Final = (
    Parameter("status", "Only in this state.", {"enum": [state.value for state in DeliveryState]}),
    Parameter("type", "Only events of this type."),
    Parameter("since", "Last changed then or later; before the first attempt, written then or later.", _DATE_TIME),
    Parameter("until", "Last changed earlier.", _DATE_TIME),
    Parameter("status_class", "By what the last attempt came to.", {"enum": [result.value for result in Result]}),
    Parameter("event_id", "Only of this event."),
)

_read_cursor: Final = re.compile(
    rf"(?:({_WAITING}|[0-9a-f]{{1,16}})-)?((?:{DELIVERY_PREFIX})?[0-9a-f]{{32}})"
).fullmatch


class DeliveryAnswer(msgspec.Struct, kw_only=True):
    """A delivery in a list. What is about the event is null once retention has dropped it."""

    id: str
    webhook_id: str
    event_id: str | None
    event_type: str | None
    status: DeliveryState
    attempts: int
    result: str | None  # of the last attempt
    status_code: int | None
    error: str | None
    redelivery: bool  # made by hand or by a replay
    created_at: str | None  # when its event was written
    updated_at: str | None
    next_attempt_at: str | None


class AttemptAnswer(msgspec.Struct, kw_only=True):
    """One attempt: what was sent, what came back, what followed."""

    number: int
    at: str  # when it ended
    duration_ms: float
    result: str
    status: int | None
    error: str | None
    delivery_status: DeliveryState  # after it
    webhook_changed: bool
    request_headers: dict[str, str] | None
    response_headers: dict[str, str]
    response_body: str | None
    body_encoding: Literal["utf-8", "base64"]
    next_attempt_at: str | None


class DeliveryDetailAnswer(msgspec.Struct, kw_only=True):
    """A single delivery."""

    id: str
    webhook_id: str
    url: str
    event_id: str | None
    event_type: str | None
    status: DeliveryState
    attempts: list[AttemptAnswer]
    result: str | None
    status_code: int | None
    error: str | None
    redelivery: bool
    created_at: str | None
    updated_at: str | None
    next_attempt_at: str | None
    request_body: str | None  # to the byte; null when the event is gone, or no body can be made of it


class Deliveries:
    """The calls."""

    def __init__(self, parts: Web, log: Log) -> None:
        self._web = parts
        self._log = log

    def routes(self) -> list[web.RouteDef]:
        """Paths below /v1."""
        one = "/deliveries/{id:[A-Za-z0-9_-]{1,64}}"
        return [
            web.get("/webhooks/{id:[A-Za-z0-9_-]{1,64}}/deliveries", self.browse),
            web.get(one, self.get),
            web.post(f"{one}/retry", self.retry),
        ]

    @operation("Deliveries", parameters=[*PAGE, *_FILTERS], answers={200: PageOf(DeliveryAnswer)})
    async def browse(self, request: web.Request) -> web.Response:
        """A webhook's deliveries; filters by status, type, since, until, status_class and event_id."""
        part = wanted(request, *FILTERS)
        return page(*await self.listed(caller(request), request.match_info["id"], part))

    async def listed(self, owner: KeyOwner, webhook_id: str, part: Wanted) -> tuple[list[DeliveryAnswer], str | None]:
        """A part of a webhook's list, and the cursor to go on from. Raises Problem."""
        chosen = _filter(part)
        endpoint_id = await self._log.deliveries.endpoint(owner.account_id, webhook_id)
        if endpoint_id is None:
            raise not_found("webhook")
        after, before = [await self._place(owner.account_id, endpoint_id, part, name) for name in ("after", "before")]
        found = await self._log.deliveries.browse(
            endpoint_id, owner.account, chosen, limit=part.limit, after=after, before=before
        )
        cursor = None if found.reached is None else self._cursor(endpoint_id, found.reached)
        return [self._shown(record, webhook_id) for record in found.deliveries], cursor

    @operation("Deliveries", answers={200: DeliveryDetailAnswer})
    async def get(self, request: web.Request) -> web.Response:
        """One delivery with every attempt."""
        no_query(request)
        return answer(await self._whole(request, await self._found(request)))

    @operation(
        "Deliveries",
        answers={201: Answer(DeliveryAnswer, headers=("Location",))},
        problems=["webhook_disabled", "event_gone"],
    )
    async def retry(self, request: web.Request) -> web.Response:
        """Deliver its event to its webhook once more: 201 with a new delivery, whatever became of the old one."""
        no_query(request)
        detail = await self._found(request)
        webhook = await self._webhook(request, detail)
        key = await self._log.deliveries.redeliver(detail)
        if key is None:
            if webhook.status is EndpointStatus.DISABLED:
                raise Problem(409, "webhook_disabled", "A disabled webhook receives nothing: resume it first.")
            raise Problem(409, "event_gone", "The event is older than the retention of events.")
        made = msgspec.structs.replace(
            detail.record,
            key=key,
            state=DeliveryState.PENDING,
            attempts=0,
            result=None,
            status=None,
            error=None,
            updated_at=detail.record.created_at or detail.record.updated_at,
            next_attempt_at=None,
        )
        shown = self._shown(made, detail.webhook_id)
        return answer(shown, 201, {"Location": f"/v1/deliveries/{shown.id}"})

    # What the path names.

    async def _found(self, request: web.Request) -> DeliveryDetail:
        key = self._log.ids.key_of(request.match_info["id"])
        detail = None if key is None else await self._log.deliveries.find(caller(request).account_id, key)
        if detail is None:
            raise not_found("delivery")
        return detail

    async def _webhook(self, request: web.Request, detail: DeliveryDetail) -> EndpointRecord:
        record = await self._web.endpoints.get(caller(request).account_id, detail.webhook_id)
        if record is None:
            raise not_found("delivery")
        return record

    # Cursors: the time of the last change in microseconds, and the delivery. An id alone stands for where it is now.

    def _cursor(self, endpoint_id: int, place: Place) -> str:
        at = _WAITING if place.at is None else f"{(place.at - _EPOCH) // _MICROSECOND:x}"
        delivery_id = self._log.ids.id_of(endpoint_id, place.event_seq, place.generation)
        return f"{at}-{delivery_id.removeprefix(DELIVERY_PREFIX)}"

    async def _place(self, account_id: int, endpoint_id: int, part: Wanted, name: str) -> Place | None:
        text = part.after if name == "after" else part.before
        if text is None:
            return None
        found = _read_cursor(text)
        key = found and self._log.ids.key_of(DELIVERY_PREFIX + found[2].removeprefix(DELIVERY_PREFIX))
        place = await self._place_of(account_id, key, found[1]) if found and key else None
        if key is None or place is None or key[0] != endpoint_id:
            raise invalid([FieldError(name, "expected what `next` of a page was, or the id of an entry")])
        return place

    async def _place_of(self, account_id: int, key: DeliveryKey, at: str | None) -> Place | None:
        if at == _WAITING:
            return Place(None, key[1], key[2])
        if at is not None:
            micros = int(at, 16)
            return Place(_EPOCH + timedelta(microseconds=micros), key[1], key[2]) if micros < 1 << 57 else None
        detail = await self._log.deliveries.find(account_id, key)
        return None if detail is None else detail.record.place

    # What is shown.

    def _shown(self, record: DeliveryRecord, webhook_id: str) -> DeliveryAnswer:
        endpoint_id, seq, generation = record.key
        return DeliveryAnswer(
            id=self._log.ids.id_of(endpoint_id, seq, generation),
            webhook_id=webhook_id,
            event_id=record.event_id,
            event_type=record.event_type,
            status=record.state,
            attempts=record.attempts,
            result=record.result,
            status_code=record.status,
            error=record.error,
            redelivery=generation > 0,
            created_at=moment(record.created_at),
            updated_at=moment(record.updated_at),
            next_attempt_at=moment(record.next_attempt_at),
        )

    async def _whole(self, request: web.Request, detail: DeliveryDetail) -> DeliveryDetailAnswer:
        webhook = await self._webhook(request, detail)
        shown = self._shown(detail.record, detail.webhook_id)
        body = _body(detail, webhook)
        made = [row for row in detail.log if row.result is not None]
        attempts = [
            self._attempt(row, detail, webhook, shown, body, is_last=row is made[-1])
            for row in made
        ]  # fmt: skip
        names = set(DeliveryDetailAnswer.__struct_fields__) - {"url", "attempts", "request_body"}
        return DeliveryDetailAnswer(
            **{name: getattr(shown, name) for name in names},
            url=webhook.url,
            attempts=attempts,
            request_body=None if body is None else body.decode(),
        )

    def _attempt(
        self,
        row: AttemptRecord,
        detail: DeliveryDetail,
        webhook: EndpointRecord,
        shown: DeliveryAnswer,
        body: bytes | None,
        *,
        is_last: bool,
    ) -> AttemptAnswer:
        text, encoding = readable(row.response_body or b"")
        return AttemptAnswer(
            number=row.attempt,
            at=to_the_millisecond(row.at),
            duration_ms=row.duration_us / 1000,
            result=row.result or "",
            status=row.status,
            error=row.error,
            delivery_status=row.state,
            webhook_changed=webhook.updated_at > row.at,
            request_headers=self._request_headers(row, webhook, shown, body),
            response_headers=headers_of(row.response_head or b""),
            response_body=text,
            body_encoding=encoding,
            next_attempt_at=shown.next_attempt_at if is_last else None,
        )

    def _request_headers(
        self, row: AttemptRecord, webhook: EndpointRecord, shown: DeliveryAnswer, body: bytes | None
    ) -> dict[str, str] | None:
        if body is None or row.result == Result.BLOCKED:
            return None  # nothing was sent, or we cannot say what
        try:
            host = self._web.guard.check_url(webhook.url).host_header
        except AddressRefused:  # by a guard that has become stricter since
            host = WITHHELD
        prefix = self._web.header_prefix
        fields = fields_of(
            host=host,
            user_agent=self._web.user_agent,
            prefix=prefix,
            own=webhook.headers.items(),
            type=shown.event_type or "",
            event_id=shown.event_id or "",
            delivery_id=shown.id,
            attempt=row.attempt,
            timestamp=WITHHELD,
            signatures=withheld(prefix, signed=webhook.signed),
            body_bytes=len(body),
        )
        return as_object(fields)


def _filter(part: Wanted) -> DeliveryFilter:
    """What the query asks for. Raises Problem."""
    given = part.filters
    span = moments(given, "since", "until")
    errors = []
    if "status" in given and given["status"] not in list(DeliveryState):
        errors.append(FieldError("status", f"expected one of {', '.join(DeliveryState)}"))
    if "status_class" in given and given["status_class"] not in list(Result):
        errors.append(FieldError("status_class", f"expected one of {', '.join(Result)}"))
    if "type" in given and not is_type(given["type"]):
        errors.append(FieldError("type", 'expected a type like "email.delivered"'))
    if span["since"] is not None and span["until"] is not None and span["until"] <= span["since"]:
        errors.append(FieldError("until", "expected a time after since"))
    if errors:
        raise invalid(errors)
    return DeliveryFilter(
        status=DeliveryState(given["status"]) if "status" in given else None,
        type=given.get("type"),
        since=span["since"],
        until=span["until"],
        result=given.get("status_class"),
        event_id=given.get("event_id"),
    )


def _body(detail: DeliveryDetail, webhook: EndpointRecord) -> bytes | None:
    """The body that was sent, made again; None if there is no making it."""
    record = detail.record
    if record.event_id is None or record.event_type is None or detail.event_created_at is None or detail.data is None:
        return None
    try:
        payload = Payload(record.event_id, record.event_type, detail.event_created_at, detail.data)
        return payload.body(webhook.body_style)
    except Undeliverable:
        return None


def headers_of(head: bytes) -> dict[str, str]:
    """The header fields of a raw response head: names as they came, repeated ones joined."""
    lines = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    return as_object((name.decode("latin-1"), value.strip().decode("latin-1")) for name, _, value in lines if name)


def as_object(fields: Iterable[tuple[str, str]] | Sequence[tuple[str, str]]) -> dict[str, str]:
    """Header fields by name; one that comes again, in whatever case, adds its value behind a comma (RFC 9110 §5.3)."""
    found: dict[str, str] = {}
    names: dict[str, str] = {}
    for name, value in fields:
        known = names.setdefault(name.lower(), name)
        found[known] = f"{found[known]}, {value}" if known in found else value
    return found


def readable(body: bytes) -> tuple[str | None, Literal["utf-8", "base64"]]:
    """A body as JSON can hold it, and in which encoding. What we cut off in the middle of a letter is still text."""
    if not body:
        return None, "utf-8"
    try:
        return body.decode(), "utf-8"
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" and error.start >= len(body) - 3:
            return body[: error.start].decode(), "utf-8"
        return base64.b64encode(body).decode(), "base64"


def to_the_millisecond(at: datetime) -> str:
    """A moment in UTC, for what happens several times a second."""
    return f"{at.astimezone(UTC).replace(tzinfo=None).isoformat(timespec='milliseconds')}Z"
