"""What goes wrong, as callers see it: RFC 9457 problem details.

    {"type": "about:blank", "title": "Unprocessable Entity", "status": 422, "code": "invalid_request",
     "detail": "…", "errors": [{"field": "events[1]", "message": "…"}]}

`code` is stable and meant for programs, `detail` and `message` for people. `errors` stands there with 422 only, and
then names every field that is wrong, not just the first: `url`, `events[1]`, `headers.X-Foo`, or an empty text for the
body as a whole. `request_id` is that of the answer's X-Request-Id, and of the log. Nothing of the program's inside is
ever told: a fault of ours says under which request id it is logged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Final

import msgspec
from aiohttp import web

CONTENT_TYPE: Final = "application/problem+json"

# Codes of what aiohttp refuses by itself, by status.
_CODES: Final = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}


class FieldError(msgspec.Struct, frozen=True):
    """One thing that is wrong with a request: where, and what would be right."""

    field: str
    message: str


class Problem(Exception):
    """Ends a request. Raised anywhere below the boundary, which answers with it."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{status} {code}: {detail}")
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = tuple(errors)
        self.headers = dict(headers or {})

    def response(self, request_id: str = "") -> web.Response:
        """The answer; `request_id` is what the log knows the request by."""
        document: dict[str, object] = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
        }
        if self.errors:
            document["errors"] = self.errors
        if request_id:
            document["request_id"] = request_id
        return web.Response(
            body=msgspec.json.encode(document), status=self.status, content_type=CONTENT_TYPE, headers=self.headers
        )


def invalid(errors: Sequence[FieldError]) -> Problem:
    """422: the request says something it cannot mean."""
    fields = ", ".join(dict.fromkeys(error.field or "the body" for error in errors))
    return Problem(422, "invalid_request", f"The request is not valid: see {fields}.", errors=errors)


def not_found(what: str) -> Problem:
    """404: there is no such thing, or it belongs to somebody else, which is not told apart."""
    return Problem(404, "not_found", f"There is no such {what}.")


def unavailable(retry_after_s: int) -> Problem:
    """503: the database is away or overloaded."""
    return Problem(
        503,
        "unavailable",
        "The database cannot be reached right now. Try again shortly.",
        headers={"Retry-After": str(retry_after_s)},
    )


def of_http(error: web.HTTPException) -> Problem:
    """What aiohttp itself refuses: paths and methods that do not exist, bodies that are too large."""
    code = _CODES.get(error.status, "bad_request")
    match error:
        case web.HTTPMethodNotAllowed():
            allowed = sorted(error.allowed_methods)
            detail = f"{error.method} cannot be done here, only {', '.join(allowed)}."
            return Problem(405, code, detail, headers={"Allow": ",".join(allowed)})
        case web.HTTPNotFound():
            return Problem(404, code, "There is nothing at this path: /docs lists every call.")
    return Problem(error.status, code, f"{HTTPStatus(error.status).phrase}.")
