"""`/openapi.json` and `/docs`: the API's description for programs and, the same one, for people.

The page is plain HTML and one style sheet, made here from the document: nothing runs in the browser and nothing is
fetched from elsewhere, so its Content-Security-Policy can forbid everything but that style sheet. Neither needs a key:
they hold nothing of any account.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from html import escape
from importlib import resources
from typing import Any, Final

import msgspec
from aiohttp import web

from dispatcher.core.catalogue import Catalogue
from dispatcher.web.answers import no_query
from dispatcher.web.openapi import Answer, Json, describe, operation
from dispatcher.web.parts import Web

POLICY: Final = (
    "default-src 'none'; style-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
METHODS: Final = ("get", "post", "put", "patch", "delete")
DEPTH_MAX: Final = 6  # of a schema told in words


class Docs:
    """The calls. `app` is set once everything is in it."""

    def __init__(self, parts: Web) -> None:
        self._web = parts
        self._made: tuple[Catalogue, bytes, str] | None = None
        self.app: web.Application | None = None

    def routes(self) -> list[web.RouteDef]:
        """Paths of the whole listener; add them before what authenticates."""
        return [
            web.get("/v1/openapi.json", self.document),
            web.get("/openapi.json", self.document),
            web.get("/docs", self.page),
            web.get("/docs.css", self.style),
        ]

    @operation("Description", answers={200: Answer(dict[str, Any], "An OpenAPI 3.1 document.")}, public=True)
    async def document(self, request: web.Request) -> web.Response:
        """This document.

        OpenAPI 3.1. Also at `/openapi.json`; as a page for people at `/docs`.
        """
        no_query(request)
        return web.Response(body=self._current()[0], content_type="application/json")

    async def page(self, request: web.Request) -> web.Response:
        """The reference, for people."""
        headers = {"Content-Security-Policy": POLICY}
        return web.Response(text=self._current()[1], content_type="text/html", headers=headers)

    async def style(self, request: web.Request) -> web.Response:
        """What it looks like."""
        text = resources.files("dispatcher.web").joinpath("static", "docs.css").read_text("utf-8")
        return web.Response(text=text, content_type="text/css", headers={"Cache-Control": "public, max-age=3600"})

    def _current(self) -> tuple[bytes, str]:
        """Document and page, made anew when a reload brought another catalogue."""
        assert self.app is not None, "the application is complete before it serves"
        if self._made is None or self._made[0] is not self._web.catalogue:
            document = describe(self.app, self._web.catalogue, self._web.header_prefix)
            self._made = (self._web.catalogue, msgspec.json.encode(document), reference(document))
        return self._made[1], self._made[2]


# ── the page ───────────────────────────────────────────────────────────────────────────────────────────────────────


def reference(document: Json) -> str:
    """The page that tells a document."""
    info = document["info"]
    title = escape(info["title"])
    body = [
        f"<header><h1>{title}</h1><p>Version {escape(info['version'])} · ",
        '<a href="/openapi.json">OpenAPI document</a></p>',
        *(f"<p>{_prose(paragraph)}</p>" for paragraph in info["description"].split("\n\n")),
        "</header>",
        *_calls(document),
        *_arrivals(document),
        *_codes(document),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<title>{title}</title><link rel="icon" href="data:,"><link rel="stylesheet" href="/docs.css"></head><body>'
        '<a class="skip" href="#content">Skip to content</a>'
        f'<nav aria-label="Contents">{"".join(_contents(document))}</nav>'
        f'<main id="content">{"".join(body)}</main></body></html>'
    )


def _operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, item in document["paths"].items():
        yield from ((method, path, item[method]) for method in METHODS if method in item)


def _contents(document: Json) -> Iterator[str]:
    for tag in document["tags"]:
        yield f"<h2>{escape(tag['name'])}</h2><ul>"
        for method, path, call in _operations(document):
            if tag["name"] in call["tags"]:
                yield f'<li><a href="#{escape(call["operationId"])}">{_method(method)} {escape(_short(path))}</a></li>'
        yield "</ul>"
    yield '<h2>What arrives</h2><ul><li><a href="#arrives">Requests to your URL</a></li>'
    yield from (f'<li><a href="#{_anchor(name)}">{escape(name)}</a></li>' for name in document["webhooks"])
    yield '</ul><h2>Errors</h2><ul><li><a href="#codes">Every code</a></li></ul>'


def _calls(document: Json) -> Iterator[str]:
    for tag in document["tags"]:
        yield f"<h2>{escape(tag['name'])}</h2>"
        for method, path, call in _operations(document):
            if tag["name"] in call["tags"]:
                yield from _call(document, method, path, call)


def _call(document: Json, method: str, path: str, call: Json) -> Iterator[str]:
    anchor = escape(call["operationId"])
    yield f'<section id="{anchor}" aria-labelledby="{anchor}-title">'
    yield f'<h3 id="{anchor}-title">{escape(call["summary"])}</h3>'
    yield f'<p class="call">{_method(method)} <code>{escape(path)}</code></p>'
    if call["description"] != call["summary"] and call["description"].rstrip(".") != call["summary"]:
        yield from (f"<p>{_prose(text)}</p>" for text in call["description"].split("\n\n"))
    if call["parameters"]:
        rows = (
            (p["name"], f"{p['in']}, {_words(document, p['schema'])}", p["description"]) for p in call["parameters"]
        )
        yield from _table("Parameters", ("Name", "Where and what", "Meaning"), rows)
    for media in call.get("requestBody", {}).get("content", {}).values():
        yield from _fields(document, "Body", media["schema"])
        yield _example("A request", _curl(method, path, media.get("example"), "security" not in call))
    yield from _answers(document, call["responses"])
    yield "</section>"


def _answers(document: Json, responses: Json) -> Iterator[str]:
    good = {status: given for status, given in responses.items() if status.startswith("2")}
    for status, given in good.items():
        yield f"<h4>{escape(status)} {_prose(given['description'])}</h4>"
        for kind, media in given.get("content", {}).items():
            if kind == "application/json":
                yield from _fields(document, "", media["schema"])
            if "example" in media:
                yield _example("An answer", _pretty(media["example"]))
    rows = ((status, given["description"], "") for status, given in responses.items() if status not in good)
    yield "<details><summary>What it may refuse with</summary>"
    yield from _table("", ("Status", "Code and meaning"), (row[:2] for row in rows))
    yield "</details>"


def _arrivals(document: Json) -> Iterator[str]:
    yield '<h2 id="arrives">What arrives</h2>'
    yield "<p>Each event is a POST to your URL. Answer 2xx at once and work later.</p>"
    for place, (name, item) in enumerate(document["webhooks"].items()):
        call = item["post"]
        if place == 0:
            rows = ((p["name"], p["description"]) for p in call["parameters"])
            yield from _table("Headers", ("Header", "Meaning"), rows)
        media = call["requestBody"]["content"]["application/json"]
        yield f'<section id="{_anchor(name)}"><h3><code>{escape(name)}</code></h3><p>{_prose(call["summary"])}.'
        yield f" {_prose(call['description'])}.</p>" if call["description"] != call["summary"] else "</p>"
        yield from _fields(document, "Data", media["schema"]["properties"]["data"])
        yield _example("The body", _pretty(media["example"]))
        yield "</section>"


def _codes(document: Json) -> Iterator[str]:
    found: dict[str, tuple[str, str]] = {}
    for _, _, call in _operations(document):
        for status, given in call["responses"].items():
            for code, text in re.findall(r"`(\w+)`: (.*?)(?= `\w+`: |$)", given["description"]):
                found[code] = (status, text)
    rows = ((f"`{code}`", status, text) for code, (status, text) in sorted(found.items(), key=lambda item: item[1][0]))
    yield '<h2 id="codes">Errors</h2>'
    yield from _table("", ("Code", "Status", "When"), rows)


# ── parts of it ────────────────────────────────────────────────────────────────────────────────────────────────────


def _fields(document: Json, caption: str, schema: Json) -> Iterator[str]:
    """A table of an object's fields; nothing for what has none."""
    schema = _resolved(document, schema)
    if "data" in schema.get("properties", {}) and "has_more" in schema["properties"]:
        yield "<p>A page; each of its <code>data</code>:</p>"
        schema = _resolved(document, schema["properties"]["data"]["items"])
    required = schema.get("required", ())
    rows = [
        (f"{name}{'' if name in required else ' (optional)'}", _words(document, member), member.get("description", ""))
        for name, member in schema.get("properties", {}).items()
    ]
    if rows:
        yield from _table(caption, ("Field", "What", "Meaning"), rows)


def _table(caption: str, heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    yield '<div class="table" tabindex="0" role="region" aria-label="' + escape(caption or "Table") + '"><table>'
    yield f"<caption>{escape(caption)}</caption>" if caption else ""
    yield "<thead><tr>" + "".join(f'<th scope="col">{escape(head)}</th>' for head in heads) + "</tr></thead><tbody>"
    for row in rows:
        first, *rest = row
        yield f'<tr><th scope="row">{_prose(first)}</th>{"".join(f"<td>{_prose(text)}</td>" for text in rest)}</tr>'
    yield "</tbody></table></div>"


def _words(document: Json, schema: Json, depth: int = 0) -> str:
    """A schema in words: `text`, `list of text or null`."""
    schema = _resolved(document, schema)
    if depth > DEPTH_MAX:
        return "…"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_words(document, choice, depth + 1) for choice in schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(f"`{choice}`" for choice in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kinds = schema.get("type", "anything")
    texts = [_word(document, schema, kind, depth) for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    return " or ".join(texts)


def _word(document: Json, schema: Json, kind: str, depth: int) -> str:
    match kind:
        case "array":
            return f"list of {_words(document, schema.get('items', {}), depth + 1)}"
        case "string":
            return {"date-time": "time"}.get(schema.get("format", ""), "text")
        case "integer" | "number":
            bounds = [
                f"{word} {schema[key]}" for key, word in (("minimum", "from"), ("maximum", "to")) if key in schema
            ]
            return " ".join(["whole number" if kind == "integer" else "number", *bounds])
        case "boolean":
            return "true or false"
    return kind


def _resolved(document: Json, schema: Json) -> Json:
    while "$ref" in schema:
        found: Json = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        schema = found | {key: value for key, value in schema.items() if key != "$ref"}
    return schema


def _curl(method: str, path: str, body: Any, with_key: bool) -> str:
    lines = [f"curl -X {method.upper()} http://127.0.0.1:8480{path}"]
    lines += ['-H "Authorization: Bearer $TRACKPOST_API_KEY"'] if with_key else []
    if body is not None:
        lines += ["-H 'Content-Type: application/json'", "-d '" + _pretty(body).replace("'", "'\\''") + "'"]
    return " \\\n  ".join(lines)


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _example(caption: str, text: str) -> str:
    body = f'<pre tabindex="0"><code>{escape(text)}</code></pre>'
    return f"<figure><figcaption>{escape(caption)}</figcaption>{body}</figure>"


def _prose(text: str) -> str:
    """Escaped, with what stands between backquotes as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _method(method: str) -> str:
    return f'<span class="method {method}">{method.upper()}</span>'


def _short(path: str) -> str:
    return path.removeprefix("/v1")


def _anchor(event_type: str) -> str:
    return f"event-{escape(event_type.replace('.', '-'))}"
