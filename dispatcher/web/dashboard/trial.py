"""Test events: choose a type, change the sample, send it, and see what came back, on the same page."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Final

from aiohttp import web

from dispatcher.core.rendering import is_type
from dispatcher.model import BodyStyle
from dispatcher.web.answers import check_query
from dispatcher.web.asked import WEBHOOK
from dispatcher.web.bodies import parse_body
from dispatcher.web.changes import Changes
from dispatcher.web.dashboard.advice import explained
from dispatcher.web.dashboard.desk import Desk
from dispatcher.web.dashboard.editing import Errors, field_errors
from dispatcher.web.dashboard.payloads import Exhibit, exhibit
from dispatcher.web.dashboard.rendering import pretty
from dispatcher.web.dashboard.visits import named, read_form
from dispatcher.web.dashboard.webhook import subject_of
from dispatcher.web.problems import FieldError, Problem, invalid
from dispatcher.web.trials import CHECKS, REFUSALS, NewTrial, TrialAnswer, Trials
from dispatcher.web.webhooks import WebhookAnswer, WebhookPatch, merged

KEPT_BYTES: Final = 4096  # as much of an answer as an attempt keeps


class TrialPage:
    """The pages."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._trials = Trials(desk.parts, desk.log)
        self._changes = Changes(desk.parts.endpoints)

    def routes(self) -> list[web.RouteDef]:
        """Paths of the whole listener."""
        return [
            self._desk.page(f"{WEBHOOK}/test", self.ask),
            self._desk.form(f"{WEBHOOK}/test", self.send),
            self._desk.form(f"{WEBHOOK}/style", self.restyle),
        ]

    async def ask(self, request: web.Request) -> web.StreamResponse:
        """The form, with the sample of the type in `?type=`."""
        check_query(request, "type", "note")
        return await self._page(request, request.query.get("type", ""), None, Errors(), None)

    async def send(self, request: web.Request) -> web.StreamResponse:
        """Send it, and tell."""
        form = await read_form(request)
        kind, data = form.get("type", ""), form.get("data", "").strip()
        try:
            body = parse_body(_document(kind, data), NewTrial, CHECKS)
            result = await self._trials.run(*named(request), body)
        except Problem as problem:
            if problem.status not in {422, 429, 503}:
                raise
            errors = problem.errors or [FieldError("data", problem.detail)]
            return await self._page(request, kind, data, field_errors(errors), None)
        return await self._page(request, kind, data, Errors(), result)

    async def restyle(self, request: web.Request) -> web.StreamResponse:
        """Take over the body style that the handler accepted."""
        form = await read_form(request)
        style = form.get("style", "")
        if style not in list(BodyStyle):
            raise invalid([FieldError("style", f"expected one of {', '.join(BodyStyle)}")])
        patch = WebhookPatch(body_style=BodyStyle(style))
        account_id, webhook_id = named(request)
        await self._changes.update(account_id, webhook_id, lambda old: merged(old, patch))
        raise web.HTTPSeeOther(f"/webhooks/{webhook_id}/test?note=styled")

    async def _page(
        self, request: web.Request, kind: str, data: str | None, errors: Errors, result: TrialAnswer | None
    ) -> web.StreamResponse:
        subject = await subject_of(self._desk, request)
        webhook: WebhookAnswer = subject["webhook"]
        catalogue = self._desk.parts.catalogue
        own = [name for name in webhook.events if is_type(name) and name not in catalogue.names()]
        samples = {entry.name: pretty(entry.sample) for entry in catalogue} | dict.fromkeys(own, "{}")
        if kind not in samples:
            kind = kind if data is not None else await self._usual(request, samples)
        return self._desk.templates.page(
            request,
            "webhook-test.html",
            status=422 if errors else 200,
            kind=kind,
            samples=samples,
            descriptions={entry.name: entry.description for entry in catalogue},
            data=samples.get(kind, "{}") if data is None else data,
            errors=errors,
            result=result,
            answer=None if result is None else _answer(result),
            advice=None if result is None else _advice(result, webhook),
            **subject,
        )

    async def _usual(self, request: web.Request, samples: Mapping[str, str]) -> str:
        """A type that the webhook asks for."""
        endpoint = await self._desk.parts.endpoints.endpoint(*named(request), self._desk.parts.defaults)
        return next(iter(samples)) if endpoint is None else self._trials.usual_type(endpoint)


def _document(kind: str, data: str) -> str:
    """The body of the API that says the same. Raises Problem for data that is no JSON, with the place in the field."""
    try:
        json.loads(data, parse_int=len)
    except RecursionError:
        raise invalid([FieldError("data", "is nested too deeply")]) from None
    except json.JSONDecodeError as error:
        message = f"expected JSON: {error.msg[:1].lower()}{error.msg[1:]} in line {error.lineno}, column {error.colno}"
        raise invalid([FieldError("data", message)]) from None
    return f'{{"type":{json.dumps(kind)},"data":{data}}}'


def _answer(result: TrialAnswer) -> Exhibit:
    body = result.response_body or ""
    raw = base64.b64decode(body) if result.body_encoding == "base64" else body.encode()
    return exhibit(raw, is_cut=len(raw) >= KEPT_BYTES)


def _advice(result: TrialAnswer, webhook: WebhookAnswer) -> str:
    """What to do about the result, in a sentence; nothing where nothing is to be done."""
    if result.delivered:
        return ""
    accepted = next((one for one in result.tries if one.status is not None and 200 <= one.status < 300), None)
    if accepted is not None and accepted.secret == "previous":  # noqa: S105  which one, not what it is
        return "It accepted the previous secret: put the new one into the handler before the rotation ends."
    if accepted is not None:
        return (
            f"It accepted the same event printed in the {accepted.body_style} style: its handler prints the body "
            f"again to verify it."
        )
    if result.status in REFUSALS and webhook.signed:
        return (
            "It accepted neither body style, so it has another secret than this webhook, or verifies something else. "
            "Compare the secrets, and the handler with the examples of the event types' pages."
        )
    return " ".join(explained(str(result.status) if result.status else result.error))
