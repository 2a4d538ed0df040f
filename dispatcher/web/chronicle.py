"""The log of deliveries as API and pages tell it.

Requests are not stored. What was sent is made again of the event and of the webhook as it is now, byte for byte the
same as long as its URL, headers and body style have not been changed: `webhook_changed` says whether they may have
been. Signatures and the timestamp they cover are not made again.

The cursors of lists are opaque: the time of the last change in microseconds, and the delivery. An id alone stands for
where that delivery is now.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

import msgspec

from dispatcher.core.head import WITHHELD, fields_of, withheld
from dispatcher.core.ids import DELIVERY_PREFIX
from dispatcher.core.rendering import Payload, is_event_id, is_type
from dispatcher.core.traces import is_traceparent
from dispatcher.errors import AddressRefused, Undeliverable
from dispatcher.model import DeliveryKey, DeliveryState, EndpointStatus, Result
from dispatcher.store.deliveries import AttemptRecord, DeliveryDetail, DeliveryFilter, DeliveryRecord, Place
from dispatcher.store.endpoints import EndpointRecord
from dispatcher.web.answers import moment
from dispatcher.web.asked import moments
from dispatcher.web.parts import Log, Web
from dispatcher.web.problems import FieldError, Problem, invalid, not_found

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_WAITING: Final = "w"  # in a cursor, in the place of the time of the last change

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


class Chronicle:
    """What is told. Everything is asked for an account, and what belongs to another one is 404."""

    def __init__(self, parts: Web, log: Log) -> None:
        self._web = parts
        self._log = log

    async def find(self, account_id: int, delivery_id: str) -> tuple[DeliveryDetail, EndpointRecord]:
        """A delivery and its webhook. Raises Problem."""
        key = self._log.ids.key_of(delivery_id)
        detail = None if key is None else await self._log.deliveries.find(account_id, key)
        webhook = None if detail is None else await self._web.endpoints.get(account_id, detail.webhook_id)
        if detail is None or webhook is None:
            raise not_found("delivery")
        return detail, webhook

    async def redeliver(self, detail: DeliveryDetail, webhook: EndpointRecord) -> DeliveryAnswer:
        """Make a new delivery of a delivery's event. Raises Problem."""
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
        return self.line(made, detail.webhook_id)

    def cursor(self, endpoint_id: int, place: Place) -> str:
        """The text that stands for a place in a list."""
        at = _WAITING if place.at is None else f"{(place.at - _EPOCH) // _MICROSECOND:x}"
        delivery_id = self._log.ids.id_of(endpoint_id, place.event_seq, place.generation)
        return f"{at}-{delivery_id.removeprefix(DELIVERY_PREFIX)}"

    async def place(self, account_id: int, endpoint_id: int, name: str, text: str | None) -> Place | None:
        """The place that a cursor, the parameter `name`, stands for. Raises Problem."""
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

    def line(self, record: DeliveryRecord, webhook_id: str) -> DeliveryAnswer:
        """A delivery as it stands in a list."""
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

    def whole(self, detail: DeliveryDetail, webhook: EndpointRecord) -> DeliveryDetailAnswer:
        """A delivery with every attempt."""
        shown, body = self.line(detail.record, detail.webhook_id), request_body(detail, webhook)
        made = [row for row in detail.log if row.result is not None]
        names = set(DeliveryDetailAnswer.__struct_fields__) - {"url", "attempts", "request_body"}
        return DeliveryDetailAnswer(
            **{name: getattr(shown, name) for name in names},
            url=webhook.url,
            attempts=[
                self._attempt(
                    row, detail, webhook, body, next_attempt_at=shown.next_attempt_at if row is made[-1] else None
                )
                for row in made
            ],
            request_body=None if body is None else body.decode(),
        )

    def _attempt(
        self,
        row: AttemptRecord,
        detail: DeliveryDetail,
        webhook: EndpointRecord,
        body: bytes | None,
        *,
        next_attempt_at: str | None,
    ) -> AttemptAnswer:
        text, encoding = readable(row.response_body or b"")
        fields = None  # of what was not sent, or of which we cannot say what it was
        if body is not None and row.result != Result.BLOCKED:
            fields = self.request_fields(row.attempt, detail, webhook, body)
        return AttemptAnswer(
            number=row.attempt,
            at=to_the_millisecond(row.at),
            duration_ms=row.duration_us / 1000,
            result=row.result or "",
            status=row.status,
            error=row.error,
            delivery_status=row.state,
            webhook_changed=webhook.updated_at > row.at,
            request_headers=None if fields is None else as_object(fields),
            response_headers=headers_of(row.response_head or b""),
            response_body=text,
            body_encoding=encoding,
            next_attempt_at=next_attempt_at,
        )

    def request_fields(
        self, attempt: int, detail: DeliveryDetail, webhook: EndpointRecord, body: bytes
    ) -> list[tuple[str, str]]:
        """The header fields that an attempt is made with, the signatures withheld."""
        record = detail.record
        try:
            host = self._web.guard.check_url(webhook.url).host_header
        except AddressRefused:  # by a guard that has become stricter since
            host = WITHHELD
        prefix = self._web.header_prefix
        return fields_of(
            host=host,
            user_agent=self._web.user_agent,
            prefix=prefix,
            own=webhook.headers.items(),
            type=record.event_type or "",
            event_id=record.event_id or "",
            delivery_id=self._log.ids.id_of(*record.key),
            attempt=attempt,
            timestamp=WITHHELD,
            signatures=withheld(prefix, signed=webhook.signed),
            body_bytes=len(body),
            # Where spans are exported, each attempt names its own, which is not on record.
            trace=WITHHELD if is_traceparent(detail.traceparent or "") else None,
        )


def filter_of(given: Mapping[str, str]) -> DeliveryFilter:
    """What parameters ask for: status, type, since, until, status_class, event_id. Raises Problem."""
    span = moments(given, "since", "until")
    errors = []
    if "status" in given and given["status"] not in list(DeliveryState):
        errors.append(FieldError("status", f"expected one of {', '.join(DeliveryState)}"))
    if "status_class" in given and given["status_class"] not in list(Result):
        errors.append(FieldError("status_class", f"expected one of {', '.join(Result)}"))
    if "type" in given and not is_type(given["type"]):
        errors.append(FieldError("type", 'expected a type like "email.delivered"'))
    if "event_id" in given and not is_event_id(given["event_id"]):
        errors.append(FieldError("event_id", "expected the id of an event"))
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


def request_body(detail: DeliveryDetail, webhook: EndpointRecord) -> bytes | None:
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
