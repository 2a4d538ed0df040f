"""`POST /v1/webhooks/{id}/test`: one event to one webhook at once, and what it answered.

A trial is no delivery: it is in no log, is not retried, counts for no statistics and teaches nothing about the webhook.
It takes the same way to the wire, guard included, and is signed like any other request, so that what it finds holds.
It goes to paused and disabled webhooks as well: that is when one wants to know.

A handler that answers 401 or 403 mostly hashes a body that it printed itself. So the same event is sent again: by the
previous secret, while a rotation lasts, and in the other body style. What the first request came to stands in front;
`tries` has all of them, and `body_style_accepted` is the style that was answered with 2xx, null if none was.
"""

# No `from __future__ import annotations` here: the fields' annotations are objects that bodies.py works with.

import dataclasses
import secrets
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Final, Literal

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from dispatcher.core.rendering import Payload, check_data, is_type
from dispatcher.core.routing import Registry
from dispatcher.model import BodyStyle, Endpoint, EndpointStatus, new_id
from dispatcher.web.answers import answer, no_query
from dispatcher.web.asked import WEBHOOK, read_optional_body, rendered
from dispatcher.web.auth import caller
from dispatcher.web.bodies import Check, expecting
from dispatcher.web.chronicle import as_object, headers_of, readable
from dispatcher.web.openapi import operation
from dispatcher.web.parts import Log, Trial, Tried, Web
from dispatcher.web.problems import FieldError, Problem, invalid, not_found

TRIALS_MAX: Final = 32  # under way at once: each may last as long as its webhook's timeout
RETRY_AFTER_S: Final = 5
REFUSALS: Final = (401, 403)


class NewTrial(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of POST …/test: nothing of it is needed."""

    type: Annotated[str | UnsetType | None, expecting('an event type, like "email.delivered"')] = UNSET
    data: Annotated[msgspec.Raw | UnsetType, expecting("an object")] = UNSET


class TryAnswer(msgspec.Struct, kw_only=True):
    """One request of a trial."""

    body_style: BodyStyle
    secret: Literal["current", "previous"] | None  # which one X-Trackpost-Signature was made by
    status: int | None
    latency_ms: float
    result: str | None
    error: str | None


class TrialAnswer(msgspec.Struct, kw_only=True):
    """A trial: its first request, and what the others showed."""

    webhook_id: str
    event_id: str
    type: str
    delivered: bool
    status: int | None
    latency_ms: float
    result: str | None
    error: str | None
    body_style: BodyStyle
    body_style_accepted: BodyStyle | None
    request_headers: dict[str, str]
    request_body: str
    response_headers: dict[str, str]
    response_body: str | None
    body_encoding: Literal["utf-8", "base64"]
    tries: list[TryAnswer]


class Trials:
    """The call."""

    def __init__(self, parts: Web, log: Log) -> None:
        self._web = parts
        self._log = log
        self._under_way = 0

    def routes(self) -> list[web.RouteDef]:
        """Paths below /v1."""
        return [web.post(f"{WEBHOOK}/test", self.create)]

    @operation(
        "Webhooks",
        body=NewTrial,
        body_required=False,
        answers={200: TrialAnswer},
        problems=["too_many_tests", "not_sent"],
    )
    async def create(self, request: web.Request) -> web.Response:
        """Send now, and tell what happened: 200 whatever it was."""
        no_query(request)
        body = await read_optional_body(request, NewTrial, CHECKS)
        return answer(await self.run(caller(request).account_id, request.match_info["id"], body))

    async def run(self, account_id: int, webhook_id: str, body: NewTrial) -> TrialAnswer:
        """Send a test that was checked. Raises Problem when there is no such webhook, or nothing to send, or no way."""
        endpoint = await self._web.endpoints.endpoint(account_id, webhook_id, self._web.defaults)
        if endpoint is None:
            raise not_found("webhook")
        if not is_rotating(endpoint):
            endpoint = dataclasses.replace(endpoint, previous_secret=None)
        payload = await self._payload(endpoint, body)
        if self._under_way >= TRIALS_MAX:
            wait = {"Retry-After": str(RETRY_AFTER_S)}
            raise Problem(429, "too_many_tests", "Too many tests are under way. Try again shortly.", headers=wait)
        self._under_way += 1
        try:
            tries = await self._try(endpoint, payload)
        finally:
            self._under_way -= 1
        return _shown(endpoint, payload, tries)

    async def _payload(self, endpoint: Endpoint, body: NewTrial) -> Payload:
        """The event to send. Raises Problem for what no webhook could be sent."""
        kind = body.type if isinstance(body.type, str) else self.usual_type(endpoint)
        known = self._web.catalogue.get(kind)
        if not isinstance(body.data, UnsetType):
            data = bytes(body.data)
        elif known is not None:
            data = msgspec.json.encode(known.sample)
        else:
            raise invalid(
                [FieldError("type", "is not in the catalogue, so there is no sample of it: give data as well")]
            )
        await rendered(check_data, kind, data)
        id_, at = new_id("evt_", time.time(), secrets.token_bytes(10)), datetime.now(UTC)
        return await rendered(lambda kind, data: Payload(id_, kind, at, data), kind, data)

    def usual_type(self, endpoint: Endpoint) -> str:
        """The first type of the catalogue that this webhook asks for; of those it does not, the first."""
        asks = Registry([dataclasses.replace(endpoint, status=EndpointStatus.ACTIVE)], 0)
        names = self._web.catalogue.names()
        return next((name for name in names if asks.match(endpoint.account, name)), names[0])

    async def _try(self, endpoint: Endpoint, payload: Payload) -> list[tuple[Trial, Tried]]:
        delivery_id = f"dlv_test_{secrets.token_hex(16)}"
        tries: list[tuple[Trial, Tried]] = []
        for style, by_previous in _ways(endpoint):
            trial = Trial(
                endpoint=endpoint, payload=payload, style=style, delivery_id=delivery_id, by_previous=by_previous
            )
            tried = await self._log.send(trial)
            if tried.attempt is None and not tries:
                raise Problem(503, "not_sent", f"The test could not be sent: {tried.reason}.")
            tries.append((trial, tried))
            if tried.attempt is None or tried.attempt.status not in REFUSALS:
                break
        return tries


def _ways(endpoint: Endpoint) -> Iterator[tuple[BodyStyle, bool]]:
    """How to send, in turn, as long as the handler says that it does not believe us."""
    own = endpoint.body_style
    yield own, False
    if endpoint.secret is None:
        return
    if endpoint.previous_secret is not None:
        yield own, True
    yield (BodyStyle.PYTHON if own is BodyStyle.COMPACT else BodyStyle.COMPACT), False


def is_rotating(endpoint: Endpoint) -> bool:
    """Whether the previous secret still counts."""
    expires = endpoint.previous_secret_expires_at
    return endpoint.previous_secret is not None and expires is not None and expires > datetime.now(UTC)


def _shown(endpoint: Endpoint, payload: Payload, tries: list[tuple[Trial, Tried]]) -> TrialAnswer:
    trial, tried = tries[0]
    attempt = tried.attempt
    assert attempt is not None, "the first one was sent"
    first = _try_shown(trial, tried)
    text, encoding = readable(attempt.body)
    accepted = [trial.style for trial, tried in tries if tried.attempt and 200 <= tried.attempt.status < 300]
    return TrialAnswer(
        webhook_id=endpoint.public_id,
        event_id=payload.event_id,
        type=payload.type,
        delivered=200 <= attempt.status < 300 and attempt.error is None,
        status=first.status,
        latency_ms=first.latency_ms,
        result=first.result,
        error=first.error,
        body_style=trial.style,
        body_style_accepted=accepted[0] if accepted else None,
        request_headers=as_object(tried.fields),
        request_body=tried.body.decode(),
        response_headers=headers_of(attempt.head),
        response_body=text,
        body_encoding=encoding,
        tries=[_try_shown(*each) for each in tries],
    )


def _try_shown(trial: Trial, tried: Tried) -> TryAnswer:
    attempt = tried.attempt
    signed_by: Literal["current", "previous"] = "previous" if trial.by_previous else "current"
    return TryAnswer(
        body_style=trial.style,
        secret=None if trial.endpoint.secret is None else signed_by,
        status=(attempt.status or None) if attempt else None,
        latency_ms=round(attempt.duration_s * 1000, 1) if attempt else 0.0,
        result=attempt.result.value if attempt else None,
        error=attempt.error if attempt else tried.reason,
    )


def _check_type(text: str) -> Iterator[FieldError]:
    if not is_type(text):
        yield FieldError("type", 'expected an event type, like "email.delivered"')


CHECKS: Final[dict[str, Check]] = {"type": _check_type}
"""What is wrong with a body beyond its types."""
