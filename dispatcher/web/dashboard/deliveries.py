"""One delivery: what happened when, what was sent and what came back, to the byte, and once more."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from datetime import datetime
from typing import Final

from aiohttp import web

from dispatcher.errors import AddressRefused
from dispatcher.model import DeliveryState, EndpointStatus, Result
from dispatcher.store.deliveries import DeliveryDetail, DeliveryRecord
from dispatcher.store.endpoints import EndpointRecord
from dispatcher.web.asked import ID
from dispatcher.web.chronicle import Chronicle, request_body
from dispatcher.web.dashboard.advice import explained
from dispatcher.web.dashboard.curl import command
from dispatcher.web.dashboard.desk import Desk
from dispatcher.web.dashboard.payloads import Exhibit, exhibit
from dispatcher.web.dashboard.visits import session_of

DELIVERY: Final = f"/deliveries/{ID}"
KEPT_BYTES: Final = 4096  # of a response body; one that is as long may have been longer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One attempt, or a settlement without one (no result)."""

    number: int
    at: datetime
    state: DeliveryState
    status: int | None
    result: str | None
    took_ms: float
    meaning: str  # of a failure
    remedy: str
    status_line: str
    fields: list[tuple[str, str]]  # of the response
    body: Exhibit


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is sent. `attempt` is the one its header fields are of; a later one differs in that number alone."""

    line: str
    fields: list[tuple[str, str]]
    body: Exhibit
    attempt: int
    curl: str
    may_differ: bool  # the webhook was changed since


class DeliveryPages:
    """The pages."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._chronicle = Chronicle(desk.parts, desk.log)

    def routes(self) -> list[web.RouteDef]:
        """Paths of the whole listener."""
        return [self._desk.page(DELIVERY, self.show), self._desk.form(f"{DELIVERY}/retry", self.retry)]

    async def show(self, request: web.Request) -> web.StreamResponse:
        """All about one delivery."""
        detail, webhook = await self._found(request)
        record, line = detail.record, self._chronicle.line(detail.record, detail.webhook_id)
        return self._desk.templates.page(
            request,
            "delivery.html",
            record=record,
            delivery=line,
            webhook=webhook,
            meaning=meaning(record, webhook),
            attempts_max=1 + self._retries(webhook),
            steps=list(steps(detail)),
            sent=self._request(detail, webhook),
        )

    async def retry(self, request: web.Request) -> web.StreamResponse:
        """Send the event again, as a new delivery, and show that one."""
        made = await self._chronicle.redeliver(*await self._found(request))
        raise web.HTTPSeeOther(f"/deliveries/{made.id}?note=redelivered")

    async def _found(self, request: web.Request) -> tuple[DeliveryDetail, EndpointRecord]:
        return await self._chronicle.find(session_of(request).owner.account_id, request.match_info["id"])

    def _retries(self, webhook: EndpointRecord) -> int:
        defaults = self._desk.parts.defaults
        if isinstance(webhook.retry, str):
            return len(defaults.schedules.get(webhook.retry, defaults.schedule_s))
        return len(defaults.schedule_s if webhook.retry is None else webhook.retry)

    def _request(self, detail: DeliveryDetail, webhook: EndpointRecord) -> Request | None:
        """What is sent; None if its event is gone, or no body can be made of it."""
        body = request_body(detail, webhook)
        if body is None:
            return None
        attempt = max(1, detail.record.attempts)
        fields = self._chronicle.request_fields(attempt, detail, webhook, body)
        try:
            target = self._desk.parts.guard.check_url(webhook.url).path
        except AddressRefused:  # by a guard that has become stricter since
            target = webhook.url
        prefix = self._desk.parts.header_prefix if webhook.signed else None
        made = [row for row in detail.log if row.result is not None]
        return Request(
            line=f"POST {target} HTTP/1.1",
            fields=fields,
            body=exhibit(body),
            attempt=attempt,
            curl=command(webhook.url, fields, body, signature_prefix=prefix),
            may_differ=bool(made) and webhook.updated_at > made[-1].at,
        )


def steps(detail: DeliveryDetail) -> Iterator[Step]:
    """The log, the latest first."""
    for row in reversed(detail.log):
        said, remedy = "", ""
        if row.result is None:
            said = row.error or ""
        elif row.result != Result.OK or row.error:
            said, remedy = explained(row.error or str(row.status))
        head = (row.response_head or b"").decode("latin-1").split("\r\n")
        body = row.response_body or b""
        yield Step(
            number=row.attempt,
            at=row.at,
            state=row.state,
            status=row.status,
            result=row.result,
            took_ms=row.duration_us / 1000,
            meaning=said,
            remedy=remedy,
            status_line=head[0],
            fields=list(_fields(head[1:])),
            body=exhibit(body, is_cut=len(body) >= KEPT_BYTES),
        )


def _fields(lines: list[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        name, _, value = line.partition(":")
        if line:
            yield name, value.strip()


def meaning(record: DeliveryRecord, webhook: EndpointRecord) -> str:
    """The state in words."""
    tries = "the first attempt" if record.attempts == 1 else f"attempt {record.attempts}"
    match record.state:
        case DeliveryState.DELIVERED:
            return f"Accepted by {tries}."
        case DeliveryState.EXHAUSTED:
            times = "Its only attempt" if record.attempts == 1 else f"All {record.attempts} attempts"
            return f"Given up. {times} failed, and nothing more is sent unless you send it again."
        case DeliveryState.DISCARDED:
            if record.attempts:
                return "Refused, and it will not be sent again: the reason is below."
            return "Not sent, and it will not be: the reason is below."
        case DeliveryState.IN_FLIGHT:
            return "A request is on its way, and its answer is awaited."
        case DeliveryState.PENDING | DeliveryState.RETRYING:
            return _waiting(record, webhook, tries)


def _waiting(record: DeliveryRecord, webhook: EndpointRecord, tries: str) -> str:
    failed = f"{tries[0].upper()}{tries[1:]} failed. " if record.attempts else ""
    if webhook.status is EndpointStatus.PAUSED:
        return f"{failed}Held, because its webhook is paused. It is sent once that is resumed."
    if webhook.status is EndpointStatus.DISABLED:
        return f"{failed}Held, because its webhook is disabled. It is sent once that is resumed."
    if record.next_attempt_at is None:
        return f"{failed}Queued: it is sent as soon as the webhook can take it."
    return failed.strip() or "Handed to the sender: its first attempt is under way or next."
