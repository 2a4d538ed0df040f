"""The API's description, OpenAPI 3.1, made of what runs: the router, the types that validate, the handlers' docstrings.

A handler says with `@operation` what it takes and gives; its docstring is the text. The document is made by walking the
router, so nothing can be in it that is not served, and a route whose handler says nothing is a failing test:

    @operation("Webhooks", body=NewWebhook, answers={201: WebhookAnswer}, problems=("conflict",))
    async def create(self, request): ...

What every call has in common (a key, the rate limit, a database that may be away) is added here, once. `PROBLEMS` lists
every `code` that any answer carries.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from importlib import resources
from typing import Annotated, Any, Final, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from aiohttp import web

from dispatcher import __version__
from dispatcher.core.catalogue import Catalogue, EventType
from dispatcher.web.answers import ID_FORM, LIMIT, LIMIT_MAX
from dispatcher.web.problems import CONTENT_TYPE

Handler = TypeVar("Handler", bound=Callable[..., Any])
Json = dict[str, Any]

OPENAPI: Final = "3.1.0"
JSON: Final = "application/json"
EVENT_STREAM: Final = "text/event-stream"
ID_PATTERN: Final = f"^{ID_FORM}$"

PROBLEMS: Final[Mapping[str, tuple[int, str]]] = {
    "bad_request": (400, "The request makes no sense to an HTTP server."),
    "invalid_json": (400, "The body is not JSON, or not UTF-8."),
    "incomplete_body": (400, "The body ended too soon or could not be decompressed."),
    "unauthorized": (401, "The API key is missing, unknown or revoked."),
    "not_found": (404, "There is no such thing, or it belongs to somebody else, which is not told apart."),
    "method_not_allowed": (405, "The path exists, the method does not; `Allow` says which do."),
    "body_timeout": (408, "The body did not arrive in time."),
    "conflict": (409, "The webhook is being changed by others at this moment: try again."),
    "idempotency_conflict": (409, "The Idempotency-Key was used within 24 hours with another type or other data."),
    "webhook_disabled": (409, "A disabled webhook receives nothing: resume it first."),
    "event_gone": (409, "The event is older than the retention of events."),
    "too_many_replays": (409, "As many replays of this webhook as may run at once do so already."),
    "precondition_failed": (412, "The webhook has another version than If-Match names: read it again."),
    "too_large": (413, "The body is larger than 1 MiB."),
    "unsupported_media_type": (415, "The body is not declared as application/json."),
    "invalid_request": (422, "Something cannot be meant that way; `errors` names every field that is wrong."),
    "rate_limited": (429, "This API key makes too many requests; `Retry-After` says how long to wait."),
    "too_many_listeners": (429, "The account, or everybody together, listens on too many connections already."),
    "too_many_tests": (429, "Too many tests are under way: try again after `Retry-After`."),
    "internal_error": (500, "Our fault. It was logged under the answer's `X-Request-Id`."),
    "not_sent": (503, "The test could not be sent, for a reason of ours that `detail` names."),
    "unavailable": (503, "The database cannot be reached right now: try again after `Retry-After`."),
}
"""Each code with its status and when it occurs."""

_ALWAYS: Final = ("invalid_request", "internal_error", "unavailable")  # any parameter that is not known is refused
_WITH_KEY: Final = ("unauthorized", "rate_limited")
_WITH_BODY: Final = ("invalid_json", "incomplete_body", "body_timeout", "too_large", "unsupported_media_type")

_ANSWER_HEADERS: Final[Mapping[str, tuple[Json, str]]] = {
    "ETag": ({"type": "string"}, "The version, for If-Match."),
    "Location": ({"type": "string"}, "The path of what was made."),
    "Retry-After": ({"type": "integer", "minimum": 1}, "Seconds to wait before another try."),
    "WWW-Authenticate": ({"type": "string"}, "How to authenticate."),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter in the query, or with `place="header"` a request header."""

    name: str
    description: str
    schema: Json = dataclasses.field(default_factory=lambda: {"type": "string"})
    place: str = "query"


_CURSOR: Final[Json] = {"type": "string", "pattern": ID_PATTERN}
_LIMIT: Final[Json] = {"type": "integer", "minimum": 1, "maximum": LIMIT_MAX, "default": LIMIT}

PAGE: Final = (
    Parameter("limit", "How many at most.", _LIMIT),
    Parameter("after", "Go on behind this id, towards older ones: `next` of the page before.", _CURSOR),
    Parameter("before", "Go on before this id, towards newer ones.", _CURSOR),
)
"""What every list takes."""

IF_MATCH: Final = Parameter("If-Match", 'Act only on this version: the value of `ETag`, like `"3"`.', place="header")


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """One successful answer. `kind` is the type of its JSON, None for an empty body."""

    kind: Any
    description: str = ""
    headers: tuple[str, ...] = ()
    content_type: str = JSON


@dataclasses.dataclass(frozen=True, slots=True)
class PageOf:
    """A part of a list of `entry`."""

    entry: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """What a handler says about itself."""

    tag: str
    answers: Mapping[int, Answer]
    body: Any
    is_body_needed: bool
    parameters: tuple[Parameter, ...]
    problems: tuple[str, ...]
    is_public: bool


def operation(
    tag: str,
    *,
    answers: Mapping[int, Any],
    body: Any = None,
    body_required: bool = True,
    parameters: Iterable[Parameter] = (),
    problems: Iterable[str] = (),
    public: bool = False,
) -> Callable[[Handler], Handler]:
    """Describe a handler; its docstring is the text, the first line the summary.

    `answers` are the successful ones by status: a type, `PageOf` one, None for no body, or an `Answer`. `body` is the
    type that `read_body` gets. `problems` are codes beyond those that every call of its kind has (see `problems_of`).
    `public` needs no key; without `body_required` a call may have no body at all.
    """
    said = Operation(
        tag,
        {status: kind if isinstance(kind, Answer) else Answer(kind) for status, kind in answers.items()},
        body,
        body_required,
        tuple(parameters),
        tuple(problems),
        public,
    )
    assert set(said.problems) <= set(PROBLEMS), f"PROBLEMS lists {said.problems}"

    def remember(handler: Handler) -> Handler:
        handler.__operation__ = said  # type: ignore[attr-defined]
        return handler

    return remember


def said_by(handler: object) -> Operation | None:
    """What a handler says about itself; None if it has no `@operation`."""
    found: Operation | None = getattr(handler, "__operation__", None)
    return found


def documented(app: web.Application) -> Iterator[tuple[str, str, Any, Operation | None]]:
    """(method, path, handler, what it says) of every route below /v1."""
    for route in app.router.routes():
        path = route.resource.canonical if route.resource is not None else ""
        if path.startswith("/v1/") and route.method != "HEAD":  # GET answers HEAD as well
            yield route.method, path, route.handler, said_by(route.handler)


def problems_of(said: Operation, path: str) -> list[str]:
    """Every code that this call may answer with."""
    codes = list(_ALWAYS if not said.is_public else ("invalid_request", "internal_error"))
    codes += () if said.is_public else _WITH_KEY
    codes += ("not_found",) if "{" in path else ()
    codes += _WITH_BODY if said.body is not None else ()
    return [code for code in PROBLEMS if code in {*codes, *said.problems}]


# ── the document ───────────────────────────────────────────────────────────────────────────────────────────────────


def describe(app: web.Application, catalogue: Catalogue, header_prefix: str = "X-Trackpost-") -> Json:
    """The document of everything `app` serves below /v1, and of what arrives at a subscriber."""
    found = [(method, path, handler, said) for method, path, handler, said in documented(app) if said is not None]
    schemas = _Schemas(said for _, _, _, said in found)
    paths: dict[str, Json] = {}
    for method, path, handler, said in found:
        paths.setdefault(path, {})[method.lower()] = _operation(path, handler, said, schemas)
    return {
        "openapi": OPENAPI,
        "info": {"title": "Webhooks API", "version": __version__, "description": _text("introduction")},
        "servers": [{"url": "/"}],
        "security": [{"apiKey": []}],
        "tags": [{"name": tag} for tag in dict.fromkeys(said.tag for _, _, _, said in found)],
        "paths": paths,
        "webhooks": {entry.name: {"post": _arrival(entry, header_prefix)} for entry in catalogue},
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {
                "apiKey": {"type": "http", "scheme": "bearer", "bearerFormat": "tp_live_…", "description": _text("key")}
            },
        },
    }


def _operation(path: str, handler: Any, said: Operation, schemas: _Schemas) -> Json:
    summary, _, description = (inspect.getdoc(handler) or "").partition("\n")
    document: Json = {
        "operationId": handler.__qualname__.replace(".", "_").lower(),
        "tags": [said.tag],
        "summary": summary.rstrip("."),
        "description": description.strip() or summary,
        "parameters": [*_path_parameters(path), *map(_parameter, said.parameters)],
        "responses": _responses(path, said, schemas),
    }
    if said.body is not None:
        document["requestBody"] = {"required": said.is_body_needed, "content": {JSON: schemas.content(said.body)}}
    if said.is_public:
        document["security"] = []
    return document


def _path_parameters(path: str) -> Iterator[Json]:
    segments = path.split("/")
    for before, segment in itertools.pairwise(segments):
        if segment.startswith("{"):
            yield {
                "name": segment[1:-1],
                "in": "path",
                "required": True,
                "description": f"The id of one of the {before.replace('-', ' ')}.",
                "schema": {"type": "string", "pattern": ID_PATTERN},
            }


def _parameter(parameter: Parameter) -> Json:
    return {
        "name": parameter.name,
        "in": parameter.place,
        "description": parameter.description,
        "schema": dict(parameter.schema),
    }


def _responses(path: str, said: Operation, schemas: _Schemas) -> Json:
    responses: Json = {}
    for status, given in said.answers.items():
        response: Json = {"description": given.description or HTTPStatus(status).phrase}
        if given.headers:
            response["headers"] = dict(map(_header, given.headers))
        if given.content_type != JSON:
            response["content"] = {given.content_type: {"schema": {"type": "string"}}}
        elif given.kind is not None:
            response["content"] = {JSON: schemas.content(given.kind)}
        responses[str(status)] = response
    codes = problems_of(said, path)
    for status in sorted({PROBLEMS[code][0] for code in codes}):
        responses[str(status)] = _refusal([code for code in codes if PROBLEMS[code][0] == status], status)
    return responses


def _refusal(codes: list[str], status: int) -> Json:
    headers = {401: ("WWW-Authenticate",), 412: ("ETag",), 429: ("Retry-After",), 503: ("Retry-After",)}
    kind = "InvalidRequest" if status == HTTPStatus.UNPROCESSABLE_ENTITY else "Problem"
    known = {"properties": {"code": {"enum": codes}, "status": {"const": status}}}
    response: Json = {
        "description": " ".join(f"`{code}`: {PROBLEMS[code][1]}" for code in codes),
        "content": {CONTENT_TYPE: {"schema": {"allOf": [{"$ref": _ref(kind)}, known]}}},
    }
    if status in headers:
        response["headers"] = dict(map(_header, headers[status]))
    return response


def _header(name: str) -> tuple[str, Json]:
    schema, description = _ANSWER_HEADERS[name]
    return name, {"description": description, "schema": schema}


def _arrival(entry: EventType, prefix: str) -> Json:
    """What a subscriber gets for one type of event."""
    envelope = {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "type": {"const": entry.name},
            "version": {"const": "1.0"},
            "created_at": {"type": "string", "format": "date-time"},
            "data": dict(entry.schema),
        },
        "required": ["id", "type", "version", "created_at", "data"],
    }
    sample = {
        "id": "evt_0194d1a5a2d07c3e9f1b2a3c4d5e6f70",
        "type": entry.name,
        "version": "1.0",
        "created_at": "2025-01-15T10:30:02Z",
        "data": dict(entry.sample),
    }
    names = {
        f"{prefix}Event": "The event's type.",
        f"{prefix}Delivery": "The delivery's id.",
        f"{prefix}Attempt": "1 for the first request of a delivery, 2 for its first retry, …",
        f"{prefix}Signature": "Hex HMAC-SHA256 of the body; absent when the webhook has no secret.",
        "webhook-id": "The event's id, the same on every attempt: recognise duplicates by it.",
        "webhook-timestamp": "Unix seconds of this attempt.",
        "webhook-signature": "Standard Webhooks 1.0.0: `v1,` and base64, one for each secret that counts.",
    }
    return {
        "operationId": f"event_{entry.name.replace('.', '_')}",
        "summary": entry.description,
        "description": entry.when or entry.description,
        "security": [],
        "parameters": [
            {"name": name, "in": "header", "description": text, "schema": {"type": "string"}}
            for name, text in names.items()
        ],
        "requestBody": {"required": True, "content": {JSON: {"schema": envelope, "example": sample}}},
        "responses": {
            "2XX": {"description": "Received. Answer at once and work later."},
            "default": {"description": "Anything else is a failed attempt and is retried; 410 disables the webhook."},
        },
    }


# ── schemas ────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Schemas:
    """The components of all types that calls take and give."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        bodies, answers = [], []
        for said in operations:
            bodies += [said.body] if said.body is not None else []
            answers += [given.kind for given in said.answers.values() if given.kind is not None]
        bodies, answers = _unique(bodies), _unique(answers)
        self._kinds = _unique([*bodies, *(kind.entry if isinstance(kind, PageOf) else kind for kind in answers)])
        schemas, self.components = msgspec.json.schema_components(self._kinds, ref_template=_ref("{name}"))
        self._schemas = list(schemas)
        for kind in bodies:
            self._explain(kind)
        for name, schema in self.components.items():
            _date(schema)
            if name in _examples():
                schema["examples"] = [_examples()[name]]
        self.components |= _PROBLEM_SCHEMAS

    def content(self, kind: Any) -> Json:
        """A media type object: the schema, and an example where there is one."""
        schema, example = self._of(kind)
        return {"schema": schema} | ({"example": example} if example is not None else {})

    def _of(self, kind: Any) -> tuple[Json, Any]:
        if isinstance(kind, PageOf):
            entry, example = self._of(kind.entry)
            page = None if example is None else {"data": [example], "has_more": False, "next": None}
            return _page_schema(entry), page
        schema = self._schemas[self._kinds.index(kind)]
        return schema, _examples().get(getattr(kind, "__name__", ""))

    def _explain(self, kind: Any) -> None:
        """Say of each field what its refusal would say; what is passed on as text must be an object."""
        properties = self.components[kind.__name__]["properties"]
        hints = get_type_hints(kind, include_extras=True)
        for field in msgspec.structs.fields(kind):
            schema = properties[field.encode_name]
            if text := _expected(hints[field.name]):
                schema["description"] = f"{text[0].upper()}{text[1:]}."
            if msgspec.Raw in (hints[field.name], *_parts(hints[field.name])):
                schema["type"] = "object"


def _unique(kinds: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(kinds))


def _parts(hint: Any) -> tuple[Any, ...]:
    inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return (inner, *get_args(inner))


def _expected(hint: Any) -> str:
    extras = (meta.extra for meta in getattr(hint, "__metadata__", ()) if isinstance(meta, msgspec.Meta) and meta.extra)
    return next((str(extra["expected"]) for extra in extras if "expected" in extra), "")


def _date(schema: Json) -> None:
    """Times are texts inside the program, since they are sent as they stand; outside they are times."""
    for name, member in schema.get("properties", {}).items():
        if name.endswith(("_at", "_since")):
            for choice in member.get("anyOf", [member]):
                if choice.get("type") == "string":
                    choice["format"] = "date-time"


def _page_schema(entry: Json) -> Json:
    return {
        "type": "object",
        "properties": {
            "data": {"type": "array", "items": entry},
            "has_more": {
                "type": "boolean",
                "description": "There may be more behind `next`. With a filter a page can be short, or empty, all the "
                "same: some thousands of entries are looked at for one.",
            },
            "next": {"type": ["string", "null"], "description": "The cursor to go on with, the same way."},
        },
        "required": ["data", "has_more", "next"],
    }


def _ref(name: str) -> str:
    return f"#/components/schemas/{name}"


_PROBLEM_SCHEMAS: Final[Json] = {
    "Problem": {
        "title": "Problem",
        "description": "Problem details (RFC 9457). `code` is stable and meant for programs, `detail` for people.",
        "type": "object",
        "properties": {
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "code": {"type": "string", "enum": list(PROBLEMS)},
            "detail": {"type": "string"},
            "request_id": {"type": "string", "description": "That of the X-Request-Id header, and of the log."},
        },
        "required": ["type", "title", "status", "code", "detail"],
    },
    "InvalidRequest": {
        "title": "InvalidRequest",
        "description": "A request that cannot be meant that way: `errors` names every field that is wrong.",
        "allOf": [{"$ref": _ref("Problem")}],
        "type": "object",
        "properties": {
            "errors": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "properties": {
                        "field": {"type": "string", "description": "`events[1]`; empty for the body as a whole."},
                        "message": {"type": "string"},
                    },
                    "required": ["field", "message"],
                },
            }
        },
        "required": ["errors"],
    },
}


@functools.cache
def _resource() -> Json:
    text = resources.files("dispatcher.web").joinpath("static", "openapi.json").read_text("utf-8")
    document: Json = json.loads(text)
    return document


def _text(name: str) -> str:
    return "\n\n".join(_resource()["texts"][name])


def _examples() -> Json:
    """Examples by the name of their type."""
    examples: Json = _resource()["examples"]
    return examples
