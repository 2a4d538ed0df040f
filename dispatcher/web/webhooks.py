"""`/v1/webhooks`: what a webhook may be, and the calls that make it so.

In an answer every setting has the value in effect: where the owner set none, that of the configuration. Only
`rate_limit` can then be null, and means no limit. `retry` is the list of delays, unless it is a preset whose name says
as much.

The version of a webhook is its ETag; If-Match makes a change depend on it (412). See `changes.py`.
"""

# No `from __future__ import annotations` here: the fields' annotations are objects that bodies.py works with.

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from itertools import islice
from typing import Annotated, Any, Final

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from dispatcher.core.backoff import PRESETS, RETRIES_MAX, format_duration, parse_duration, parse_schedule
from dispatcher.core.headers import HEADERS_MAX, HeadersRefused, check_headers
from dispatcher.core.signing import new_secret
from dispatcher.errors import AddressRefused
from dispatcher.model import BodyStyle, Discreet, EndpointStatus
from dispatcher.store.endpoints import ID_PREFIX, EndpointChange, EndpointDefaults, EndpointRecord
from dispatcher.web.answers import answer, cut, moment, no_query, page, wanted
from dispatcher.web.asked import WEBHOOK, nothing_said, read_optional_body
from dispatcher.web.auth import caller
from dispatcher.web.bodies import Check, expecting, read_body
from dispatcher.web.changes import Changes, Expect
from dispatcher.web.openapi import IF_MATCH, PAGE, Answer, PageOf, operation
from dispatcher.web.parts import Web
from dispatcher.web.problems import FieldError, Problem, invalid, not_found

EVENTS_MAX: Final = 100
WRONG_EVENTS_MAX: Final = 20  # named in one answer: finding the nearest name takes a while
DESCRIPTION_MAX: Final = 1024
SECRET_MAX: Final = 256
SECRET_RANDOM_BYTES: Final = 32
GRACE_S: Final = 86400.0  # the customary overlap of two secrets
GRACE_MAX_S: Final = 30 * 86400

DEFAULT: Final = "default"  # the configured schedule, by name
NEW: Final = EndpointChange(
    url="",
    description="",
    events=[],
    headers={},
    body_style=BodyStyle.COMPACT,
    retry=None,
    max_concurrency=None,
    rate_limit=None,
    ordered=False,
    timeout_s=None,
)
"""A webhook of which nothing was said."""

_has_controls: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]").search

_URL: Final = expecting("an https URL, like https://example.com/webhooks")
_EVENTS: Final = expecting(f'a list of 1 to {EVENTS_MAX} event types, like ["email.delivered", "email.*"]')
Events = Annotated[list[str], Meta(min_length=1, max_length=EVENTS_MAX)]


class Settings(Discreet, msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a call may say about a webhook. Null resets a setting to its default; a secret of null means unsigned."""

    secret: Annotated[
        Annotated[str, Meta(min_length=1, max_length=SECRET_MAX)] | UnsetType | None,
        expecting(f"text of 1 to {SECRET_MAX} printable characters, or null for requests without a signature"),
    ] = UNSET
    description: Annotated[
        Annotated[str, Meta(max_length=DESCRIPTION_MAX)] | UnsetType | None,
        expecting(f"text of at most {DESCRIPTION_MAX} characters"),
    ] = UNSET
    headers: Annotated[
        Annotated[dict[str, str], Meta(max_length=HEADERS_MAX)] | UnsetType | None,
        expecting(f"an object of at most {HEADERS_MAX} texts"),
    ] = UNSET
    body_style: Annotated[BodyStyle | UnsetType | None, expecting('"compact" or "python"')] = UNSET
    retry: Annotated[
        str | list[str | float] | UnsetType | None,
        expecting(f'one of {", ".join(PRESETS)}, or a list of at most {RETRIES_MAX} delays like ["1m", 90, "1h"]'),
    ] = UNSET
    max_concurrency: Annotated[
        Annotated[int, Meta(ge=1)] | UnsetType | None, expecting("a whole number of at least 1")
    ] = UNSET
    # The slowest is one request in 17 minutes; far less would be a division by next to nothing.
    rate_limit: Annotated[
        Annotated[float, Meta(ge=0.001, le=10_000)] | UnsetType | None,
        expecting("a number of requests per second from 0.001 to 10000, or null for no limit"),
    ] = UNSET
    ordered: Annotated[bool | UnsetType | None, expecting("true or false")] = UNSET
    # No answer comes in less than a tenth of a second for long; five minutes is where the configuration ends, too.
    timeout_s: Annotated[
        Annotated[float, Meta(ge=0.1, le=300)] | UnsetType | None, expecting("a number of seconds from 0.1 to 300")
    ] = UNSET


class NewWebhook(Settings, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/webhooks."""

    url: Annotated[str, _URL]
    events: Annotated[Events, _EVENTS]


class WebhookPatch(Settings, kw_only=True, forbid_unknown_fields=True):
    """The body of PATCH /v1/webhooks/{id}: what is not in it stays. A secret replaces the old one at once."""

    url: Annotated[str | UnsetType, _URL] = UNSET
    events: Annotated[Events | UnsetType, _EVENTS] = UNSET


class Rotation(Discreet, msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of POST …/rotate-secret: nothing of it is needed. A grace of 0 ends the old secret at once."""

    secret: Annotated[
        Annotated[str, Meta(min_length=1, max_length=SECRET_MAX)] | UnsetType,
        expecting(f"text of 1 to {SECRET_MAX} printable characters"),
    ] = UNSET
    grace_s: Annotated[
        Annotated[float, Meta(ge=0, le=GRACE_MAX_S)], expecting(f"a number of seconds from 0 to {GRACE_MAX_S}")
    ] = GRACE_S


class WebhookAnswer(Discreet, msgspec.Struct, kw_only=True):
    """A webhook as its owner reads it. `secret` is there only when it was just made."""

    id: str
    url: str
    description: str
    events: list[str]
    status: EndpointStatus
    disabled_reason: str | None
    signed: bool
    secret: str | UnsetType | None = UNSET
    headers: dict[str, str]
    body_style: BodyStyle
    retry: str | list[str]
    max_concurrency: int
    rate_limit: float | None
    ordered: bool
    timeout_s: float
    created_at: str | None
    updated_at: str | None
    previous_secret_expires_at: str | None  # a rotation under way: until then the old secret signs as well
    failing_since: str | None
    last_error: str | None


class SecretAnswer(Discreet, msgspec.Struct, kw_only=True):
    """What a webhook's requests are signed with; null when they are not."""

    secret: str | None


_CHANGED: Final = Answer(WebhookAnswer, "The webhook as it is now.", headers=("ETag",))
_CHANGE: Final = ("precondition_failed", "conflict")


class Webhooks:
    """The calls."""

    def __init__(self, parts: Web) -> None:
        self._web = parts
        self._changes = Changes(parts.endpoints)

    def routes(self) -> list[web.RouteDef]:
        """Paths below /v1."""
        return [
            web.post("/webhooks", self.create),
            web.get("/webhooks", self.browse),
            web.get(WEBHOOK, self.get),
            web.patch(WEBHOOK, self.update),
            web.delete(WEBHOOK, self.delete),
            web.post(f"{WEBHOOK}/pause", self.pause),
            web.post(f"{WEBHOOK}/resume", self.resume),
            web.get(f"{WEBHOOK}/secret", self.secret),
            web.post(f"{WEBHOOK}/rotate-secret", self.rotate_secret),
        ]

    @operation(
        "Webhooks",
        body=NewWebhook,
        answers={201: Answer(WebhookAnswer, "The webhook, with its secret.", headers=("ETag", "Location"))},
    )
    async def create(self, request: web.Request) -> web.Response:
        """Register a webhook: 201 with the secret, made here unless one was given."""
        no_query(request)
        body = await read_body(request, NewWebhook, checks(self._web))
        record, secret = await register(self._web, caller(request).account_id, body)
        return self._answer(record, 201, {"Location": f"/v1/webhooks/{record.id}"}, secret)

    @operation("Webhooks", parameters=PAGE, answers={200: PageOf(WebhookAnswer)})
    async def browse(self, request: web.Request) -> web.Response:
        """The account's webhooks, newest first."""
        part = wanted(request, prefix=ID_PREFIX)
        found = await self._web.endpoints.list(
            caller(request).account_id, limit=part.limit + 1, after=part.after, before=part.before
        )
        records, next_cursor = cut(found, part)
        return page([shown(record, self._web.defaults) for record in records], next_cursor)

    @operation(
        "Webhooks",
        parameters=[IF_MATCH],
        answers={200: Answer(WebhookAnswer, headers=("ETag",))},
        problems=["precondition_failed"],
    )
    async def get(self, request: web.Request) -> web.Response:
        """One webhook, with its version as ETag."""
        no_query(request)
        return self._answer(await self._changes.current(*_named(request)))

    @operation("Webhooks", body=WebhookPatch, parameters=[IF_MATCH], answers={200: _CHANGED}, problems=_CHANGE)
    async def update(self, request: web.Request) -> web.Response:
        """Change some settings."""
        no_query(request)
        patch = await read_body(request, WebhookPatch, checks(self._web))
        account_id, webhook_id, expect = _named(request)
        record = await self._changes.update(
            account_id, webhook_id, lambda old: merged(old, patch), patch.secret, expect
        )
        return self._answer(record)

    @operation("Webhooks", parameters=[IF_MATCH], answers={204: None}, problems=_CHANGE)
    async def delete(self, request: web.Request) -> web.Response:
        """Remove a webhook and what waits for it: 204."""
        no_query(request)
        await self._changes.delete(*_named(request))
        return web.Response(status=204)

    @operation("Webhooks", parameters=[IF_MATCH], answers={200: _CHANGED}, problems=[*_CHANGE, "webhook_disabled"])
    async def pause(self, request: web.Request) -> web.Response:
        """Stop new attempts and hold what comes. Pausing twice is no mistake; pausing what is disabled is."""
        await nothing_said(request)
        return self._answer(await self._changes.pause(*_named(request)))

    @operation("Webhooks", parameters=[IF_MATCH], answers={200: _CHANGED}, problems=_CHANGE)
    async def resume(self, request: web.Request) -> web.Response:
        """Send again, what was held first; re-activates a disabled webhook too."""
        await nothing_said(request)
        return self._answer(await self._changes.resume(*_named(request)))

    @operation("Webhooks", answers={200: SecretAnswer})
    async def secret(self, request: web.Request) -> web.Response:
        """The signing secret; null when the webhook is unsigned."""
        no_query(request)
        found = await self._web.endpoints.secret(caller(request).account_id, request.match_info["id"])
        if found is None:
            raise not_found("webhook")
        return answer(SecretAnswer(secret=found.current))

    @operation(
        "Webhooks",
        body=Rotation,
        body_required=False,
        parameters=[IF_MATCH],
        answers={200: _CHANGED},
        problems=_CHANGE,
    )
    async def rotate_secret(self, request: web.Request) -> web.Response:
        """Replace the secret; the old one signs on for a day, or for `grace_s`. The answer carries the new one."""
        no_query(request)
        body = await read_optional_body(request, Rotation, rotation_checks())
        secret = given_or_new(body.secret)
        account_id, webhook_id, expect = _named(request)
        grace = timedelta(seconds=body.grace_s)
        record = await self._changes.rotate(account_id, webhook_id, secret, grace, expect)
        return self._answer(record, secret=secret)

    def _answer(
        self,
        record: EndpointRecord,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        secret: str | UnsetType | None = UNSET,
    ) -> web.Response:
        document = shown(record, self._web.defaults, secret)
        return answer(document, status, {"ETag": _etag(record), **(headers or {})})


def _named(request: web.Request) -> tuple[int, str, Expect]:
    """The webhook of the path: the caller's account, its id, and the version that If-Match names (else 412)."""
    tags = request.if_match
    if "If-Match" in request.headers and not tags:
        raise invalid([FieldError("If-Match", 'expected an ETag in its quotation marks, like "3", or *')])

    def expect(record: EndpointRecord) -> None:
        matches = {"*", str(record.version)}
        if tags is not None and not any(tag.value in matches and not tag.is_weak for tag in tags):
            detail = "The webhook has changed since: read it again."
            raise Problem(412, "precondition_failed", detail, headers={"ETag": _etag(record)})

    return caller(request).account_id, request.match_info["id"], expect


async def register(parts: Web, account_id: int, body: NewWebhook) -> tuple[EndpointRecord, str | None]:
    """Make a webhook of a body that was checked; with its secret, which is None if it is unsigned."""
    secret = None if body.secret is None else given_or_new(body.secret)
    return await parts.endpoints.create(account_id, merged(NEW, body), secret), secret


def given_or_new(secret: str | UnsetType) -> str:
    """The secret that was given, or one made here."""
    return new_secret(secrets.token_bytes(SECRET_RANDOM_BYTES)) if isinstance(secret, UnsetType) else secret


def checks(parts: Web) -> dict[str, Check]:
    """What is wrong with settings beyond their types."""
    return {
        "url": lambda url: _check_url(parts, url),
        "events": lambda events: _check_events(parts, events),
        "secret": _check_secret,
        "description": _check_description,
        "headers": lambda headers: _check_headers(parts, headers),
        "retry": _check_retry,
        "max_concurrency": lambda most: _check_max_concurrency(parts, most),
    }


def rotation_checks() -> dict[str, Check]:
    """The same for a rotation."""
    return {"secret": _check_secret}


def _check_url(parts: Web, url: str) -> Iterator[FieldError]:
    try:
        parts.guard.check_url(url)
    except AddressRefused as refused:
        yield FieldError("url", str(refused))


def _check_events(parts: Web, events: list[str]) -> Iterator[FieldError]:
    found = ((place, parts.catalogue.check_filter(text)) for place, text in enumerate(events))
    wrong = (FieldError(f"events[{place}]", message) for place, message in found if message is not None)
    return islice(wrong, WRONG_EVENTS_MAX)


def _check_headers(parts: Web, headers: dict[str, str]) -> Iterator[FieldError]:
    try:
        check_headers(headers, parts.header_prefix)
    except HeadersRefused as refused:
        yield from (FieldError(field, message) for field, message in refused.problems)


def _check_max_concurrency(parts: Web, most: int) -> Iterator[FieldError]:
    ceiling = parts.defaults.max_concurrency
    if most > ceiling:
        yield FieldError("max_concurrency", f"expected a whole number from 1 to {ceiling}")


def merged(old: EndpointChange, said: NewWebhook | WebhookPatch) -> EndpointChange:
    """`old` with what a body says, which was checked."""
    change: dict[str, Any] = {}
    for name in EndpointChange.__struct_fields__:
        value = getattr(said, name)
        if value is not UNSET:
            change[name] = getattr(NEW, name) if value is None else value
    if "events" in change:
        change["events"] = list(dict.fromkeys(change["events"]))
    if "headers" in change:
        change["headers"] = {name: value.strip(" \t") for name, value in change["headers"].items()}
    if "retry" in change:
        change["retry"] = _stored_retry(change["retry"])
    return msgspec.structs.replace(old, **change)


def shown(record: EndpointRecord, defaults: EndpointDefaults, secret: str | UnsetType | None = UNSET) -> WebhookAnswer:
    """A webhook with every setting as it is in effect."""
    return WebhookAnswer(
        id=record.id,
        url=record.url,
        description=record.description,
        events=record.events,
        status=record.status,
        disabled_reason=record.disabled_reason,
        signed=record.signed,
        secret=secret,
        headers=record.headers,
        body_style=record.body_style,
        retry=_shown_retry(defaults.schedule_s if record.retry is None else record.retry),
        max_concurrency=min(record.max_concurrency or defaults.max_concurrency, defaults.max_concurrency),
        rate_limit=record.rate_limit,
        ordered=record.ordered,
        timeout_s=record.timeout_s or defaults.timeout_s,
        created_at=moment(record.created_at),
        updated_at=moment(record.updated_at),
        previous_secret_expires_at=moment(record.previous_secret_expires_at),
        failing_since=moment(record.failing_since),
        last_error=record.last_error,
    )


def _shown_retry(retry: str | Iterable[float]) -> str | list[str]:
    return retry if isinstance(retry, str) else [format_duration(delay_s) for delay_s in retry]


def _stored_retry(retry: str | list[str | float] | None) -> str | list[float] | None:
    if retry is None or retry == DEFAULT:
        return None
    return retry if isinstance(retry, str) else list(parse_schedule(retry))


def _check_secret(secret: str) -> Iterator[FieldError]:
    if not secret.isprintable():
        yield FieldError("secret", "expected printable characters: no line breaks, no controls")


def _check_description(description: str) -> Iterator[FieldError]:
    if _has_controls(description):
        yield FieldError("description", "expected text without control characters")


def _check_retry(retry: str | list[str | float]) -> Iterator[FieldError]:
    found = list(_wrong_delays(retry)) if isinstance(retry, list) else []
    yield from found
    if not found:
        try:
            parse_schedule(retry)
        except ValueError as error:
            yield FieldError("retry", str(error))


def _wrong_delays(delays: list[str | float]) -> Iterator[FieldError]:
    for place, delay in enumerate(delays[:RETRIES_MAX]):
        try:
            parse_duration(delay)
        except ValueError as error:
            yield FieldError(f"retry[{place}]", str(error))


def _etag(record: EndpointRecord) -> str:
    return f'"{record.version}"'
