"""Adding a webhook, and changing its settings.

A form says the same as a body of the API does and is turned into one, so both are checked by the same code; what is
wrong comes back beside its field, with everything as it was entered. A change names the version it was made of. If
somebody else has changed the webhook meanwhile, the form comes back too, and says what is different now.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
from aiohttp import web

from dispatcher.core.backoff import PRESETS, format_duration
from dispatcher.core.catalogue import OWN_TYPES, EventType
from dispatcher.model import BodyStyle
from dispatcher.store.endpoints import EndpointChange, EndpointRecord
from dispatcher.web.asked import WEBHOOK
from dispatcher.web.bodies import parse_body
from dispatcher.web.changes import Changes
from dispatcher.web.dashboard.desk import Desk
from dispatcher.web.dashboard.visits import named, read_form, session_of
from dispatcher.web.problems import FieldError, Problem
from dispatcher.web.webhooks import NewWebhook, WebhookPatch, checks, merged, register, shown

CUSTOM: Final = "custom"
NAMES: Final = {
    "url": "URL",
    "description": "Description",
    "events": "Events",
    "secret": "Signature",
    "headers": "Headers",
    "body_style": "Body style",
    "retry": "Retries",
    "max_concurrency": "Requests at a time",
    "rate_limit": "Requests a second",
    "ordered": "Order",
    "timeout_s": "Timeout",
}

_is_number: Final = re.compile(r"-?(?:0|[1-9][0-9]{0,15})(?:\.[0-9]{1,9})?").fullmatch


class Errors(dict[str, list[str]]):
    """What is wrong, by field; nothing is wrong with the others."""

    def __missing__(self, field: str) -> list[str]:
        return []


class Editing:
    """The pages."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._changes = Changes(desk.parts.endpoints)

    def routes(self) -> list[web.RouteDef]:
        """Paths of the whole listener; they come before those of one webhook, whose id `new` is not."""
        return [
            self._desk.page("/webhooks/new", self.blank),
            self._desk.form("/webhooks/new", self.create),
            self._desk.page(f"{WEBHOOK}/edit", self.edit),
            self._desk.form(f"{WEBHOOK}/edit", self.update),
        ]

    async def blank(self, request: web.Request) -> web.StreamResponse:
        """A form for a new webhook. `?events=` chooses types beforehand."""
        form = _BLANK | {"events": "\n".join(request.query.getall("events", []))}
        return self._page(request, form, None)

    async def create(self, request: web.Request) -> web.StreamResponse:
        """Make it, and show its secret."""
        form = await read_form(request)
        try:
            body = parse_body(_document(form), NewWebhook, checks(self._desk.parts))
        except Problem as problem:
            return self._page(request, form, None, problem.errors)
        record, secret = await register(self._desk.parts, session_of(request).owner.account_id, body)
        return self._desk.templates.page(
            request,
            "webhook-created.html",
            status=201,
            webhook=shown(record, self._desk.parts.defaults),
            secret=secret,
            was_given=isinstance(body.secret, str),
        )

    async def edit(self, request: web.Request) -> web.StreamResponse:
        """A form with the settings as they are."""
        record = await self._changes.current(*named(request))
        return self._page(request, _form(record), record)

    async def update(self, request: web.Request) -> web.StreamResponse:
        """Save them, unless they are those of another version."""
        form = await read_form(request)
        account_id, webhook_id = named(request)
        try:
            patch = parse_body(_document(form), WebhookPatch, checks(self._desk.parts))
        except Problem as problem:
            record = await self._changes.current(account_id, webhook_id)
            return self._page(request, form | {"version": form.get("version", "")}, record, problem.errors)

        def expect(record: EndpointRecord) -> None:
            if form.get("version") != str(record.version):
                raise _ChangedMeanwhileError(record)

        try:
            await self._changes.update(account_id, webhook_id, lambda old: _changed(old, patch), patch.secret, expect)
        except _ChangedMeanwhileError as meanwhile:
            record = meanwhile.record
            return self._page(request, form | {"version": str(record.version)}, record, status=409)
        raise web.HTTPSeeOther(f"/webhooks/{webhook_id}?note=saved")

    def _page(
        self,
        request: web.Request,
        form: Mapping[str, str],
        record: EndpointRecord | None,
        errors: Iterable[FieldError] = (),
        status: int | None = None,
    ) -> web.Response:
        found = field_errors(errors)
        filled = _BLANK | dict(form)
        chosen = set(filled["events"].split("\n"))
        if found["events"] and not _events(filled):
            found["events"] = ["Choose at least one."]
        parts = self._desk.parts
        listed = {name for group in _groups(parts.catalogue) for name in group.offered}
        return self._desk.templates.page(
            request,
            "webhook-form.html",
            status=status or (422 if found else 200),
            webhook=None if record is None else shown(record, parts.defaults),
            form=filled | {"events_more": _more(filled, chosen, listed)},
            errors=found,
            names=NAMES,
            differences=_differences(filled, record) if status == 409 and record is not None else [],
            groups=_groups(parts.catalogue),
            chosen=chosen,
            own_types=OWN_TYPES,
            presets=[name for name in PRESETS if name != "default"],
            default_retry=", ".join(map(format_duration, parts.defaults.schedule_s)) or "none",
            defaults=parts.defaults,
            styles=list(BodyStyle),
            custom=CUSTOM,
        )


class _ChangedMeanwhileError(Exception):
    def __init__(self, record: EndpointRecord) -> None:
        super().__init__(record.id)
        self.record = record


class Group:
    """Types of the catalogue that begin alike."""

    def __init__(self, prefix: str, types: Sequence[EventType]) -> None:
        self.all = f"{prefix}.*"
        self.types = types
        self.offered = {self.all, *(one.name for one in types)}


def _groups(catalogue: Iterable[EventType]) -> list[Group]:
    found: dict[str, list[EventType]] = {}
    for one in catalogue:
        found.setdefault(one.name.partition(".")[0], []).append(one)
    return [Group(prefix, types) for prefix, types in found.items()]


_BLANK: Final = {
    "url": "",
    "description": "",
    "events": "",
    "events_more": "",
    "signing": "new",
    "secret": "",
    "headers": "",
    "body_style": "compact",
    "retry": "default",
    "retry_custom": "",
    "max_concurrency": "",
    "rate_limit": "",
    "ordered": "",
    "timeout_s": "",
    "version": "",
}


def _document(form: Mapping[str, str]) -> str:
    """The body of the API that says the same. What cannot be is left for the checks to find."""
    filled = _BLANK | {"signing": "keep"} | dict(form)
    members: dict[str, str] = {
        "url": json.dumps(filled["url"].strip()),
        "description": json.dumps(filled["description"].strip()),
        "events": json.dumps(_events(filled)),
        "headers": json.dumps(_headers(filled["headers"])),
        "body_style": json.dumps(filled["body_style"]),
        "retry": json.dumps(_retry(filled)),
        "max_concurrency": number(filled["max_concurrency"]),
        "rate_limit": number(filled["rate_limit"]),
        "timeout_s": number(filled["timeout_s"]),
        "ordered": "true" if filled["ordered"] else "false",
    }
    if filled["signing"] == "none":
        members |= {"secret": "null"}
    elif filled["signing"] == "own":
        members["secret"] = json.dumps(filled["secret"].strip())
    return "{" + ",".join(f"{json.dumps(name)}:{text}" for name, text in members.items()) + "}"


def _events(form: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys(re.findall(r"[^\s,]+", f"{form['events']}\n{form['events_more']}")))


def _headers(text: str) -> Any:
    """`Name: value` in each line; anything else is passed on as it is, to be refused."""
    lines = [line for line in text.splitlines() if line.strip()]
    pairs = [line.partition(":") for line in lines]
    names = {name.strip().lower() for name, _, _ in pairs}
    if len(names) < len(pairs) or not all(colon for _, colon, _ in pairs):
        return lines
    return {name.strip(): value.strip() for name, _, value in pairs}


def _retry(form: Mapping[str, str]) -> str | list[str] | None:
    if form["retry"] == CUSTOM:
        return re.findall(r"[^\s,]+", form["retry_custom"])
    return None if form["retry"] == "default" else form["retry"]


def number(text: str) -> str:
    """What was typed as a member of a body: a number as one, anything else as text, for the checks to refuse."""
    text = text.strip()
    if not text:
        return "null"
    return text if _is_number(text) else json.dumps(text)


def _form(record: EndpointRecord) -> dict[str, str]:
    """A form that says what the record does."""
    is_custom = isinstance(record.retry, list)
    retry = "default" if record.retry is None else CUSTOM if is_custom else str(record.retry)
    delays = ", ".join(map(format_duration, record.retry)) if isinstance(record.retry, list) else ""
    return {
        "url": record.url,
        "description": record.description,
        "events": "\n".join(record.events),
        "events_more": "",
        "signing": "keep",
        "secret": "",
        "headers": "\n".join(f"{name}: {value}" for name, value in record.headers.items()),
        "body_style": record.body_style.value,
        "retry": retry,
        "retry_custom": delays,
        "max_concurrency": _text(record.max_concurrency),
        "rate_limit": _text(record.rate_limit),
        "ordered": "yes" if record.ordered else "",
        "timeout_s": _text(record.timeout_s),
        "version": str(record.version),
    }


def _changed(old: EndpointChange, patch: WebhookPatch) -> EndpointChange:
    """The settings with the patch. Boxes come in an order of their own, which is no change."""
    new = merged(old, patch)
    is_same = sorted(new.events) == sorted(old.events)
    return msgspec.structs.replace(new, events=old.events) if is_same else new


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _more(form: Mapping[str, str], chosen: set[str], listed: set[str]) -> str:
    """Types that no box stands for."""
    more = re.findall(r"[^\s,]+", form["events_more"])
    unlisted = sorted(name for name in chosen - listed - {"*", "", *more})
    return " ".join([*unlisted, *more])


def field_errors(errors: Iterable[FieldError]) -> Errors:
    """What is wrong, by the field of the form: `headers.X-Foo` belongs to `headers`, and says which one it means."""
    found = Errors()
    for error in errors:
        field, rest = re.match(r"([^.\[]*)\.?(.*)", error.field, re.DOTALL).groups()  # type: ignore[union-attr]
        message = f"{rest}: {error.message}" if rest and not rest.startswith("[") else error.message
        if field == "headers" and "expected an object" in message:
            message = "Write each header once, in a line of its own: Name: value"
        found.setdefault(field, []).append(message[:1].upper() + message[1:])
    return found


def _differences(form: Mapping[str, str], record: EndpointRecord) -> list[tuple[str, str]]:
    """Settings that are others now than this form says, with what they are."""
    now = _form(record)
    entered = dict(form) | {"events": "\n".join(sorted(_events(form)))}
    now["events"] = "\n".join(sorted(record.events))
    names = NAMES | {"retry_custom": "Delays"}
    return [
        (names[name], value.replace("\n", ", ") or "not set")
        for name, value in now.items()
        if name in names and name != "secret" and value != entered[name].replace("\r\n", "\n").strip()
    ]
