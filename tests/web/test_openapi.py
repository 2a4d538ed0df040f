"""The description and what is served are one: neither has anything that the other has not."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema_rs
import pytest
from aiohttp.test_utils import TestClient, TestServer

import dispatcher.web
from dispatcher.core.ids import DeliveryIds
from dispatcher.store.deliveries import DeliveryStore
from dispatcher.store.replays import ReplayStore
from dispatcher.web.api import build_api_app
from dispatcher.web.docs import POLICY
from dispatcher.web.openapi import PROBLEMS, describe, documented, problems_of
from dispatcher.web.parts import Log, Trial, Tried, Web

if TYPE_CHECKING:
    from tests.web.conftest import Api

SOURCES = sorted(Path(dispatcher.web.__file__).parent.glob("*.py"))
FROM_AIOHTTP = {"bad_request", "method_not_allowed"}  # of requests that no operation gets to see


async def unsent(_: Trial) -> Tried:
    return Tried(attempt=None, fields=[], body=b"", reason="nobody sends here")


@pytest.fixture
def parts(parts: Web, pool: Any) -> Web:
    """With everything that can be served."""
    log = Log(deliveries=DeliveryStore(pool), replays=ReplayStore(pool), ids=DeliveryIds(b"1" * 16), send=unsent)
    return dataclasses.replace(parts, log=log)


@pytest.fixture
def document(parts: Web) -> dict[str, Any]:
    return describe(build_api_app(parts), parts.catalogue)


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        yield from ((method.upper(), path, call) for method, call in item.items())


async def test_every_route_is_described_and_everything_described_is_routed(
    parts: Web, document: dict[str, Any]
) -> None:
    app = build_api_app(parts)
    assert [(method, path) for method, path, _, said in documented(app) if said is None] == []
    routed = {(method, path) for method, path, _, _ in documented(app)}
    assert routed == {(method, path) for method, path, _ in operations(document)}
    assert len(routed) == len(list(documented(app)))


async def test_the_calls_customers_are_promised_are_there(document: dict[str, Any]) -> None:
    one = "/v1/webhooks/{id}"
    promised = {
        ("POST", "/v1/webhooks"), ("GET", "/v1/webhooks"), ("GET", one), ("PATCH", one), ("DELETE", one),
        ("GET", f"{one}/secret"), ("POST", f"{one}/pause"), ("POST", f"{one}/resume"), ("POST", f"{one}/test"),
        ("POST", f"{one}/rotate-secret"), ("GET", f"{one}/deliveries"), ("GET", "/v1/deliveries/{id}"),
        ("POST", "/v1/deliveries/{id}/retry"), ("POST", f"{one}/replay"), ("GET", f"{one}/stats"),
        ("POST", "/v1/events"), ("GET", "/v1/events"), ("GET", "/v1/events/{id}"), ("GET", "/v1/event-types"),
        ("GET", "/v1/listen"),
        ("GET", "/v1/openapi.json"),
    }  # fmt: skip
    assert promised <= {(method, path) for method, path, _ in operations(document)}


async def test_each_call_says_what_it_is_and_has_a_name_of_its_own(document: dict[str, Any]) -> None:
    calls = [call for _, _, call in operations(document)]
    assert all(call["summary"] and call["description"] for call in calls)
    assert len({call["operationId"] for call in calls}) == len(calls)


async def test_the_document_is_openapi(document: dict[str, Any]) -> None:
    """Not by its whole meta-schema, which lies elsewhere: by what tools trip over."""
    assert document["openapi"].startswith("3.1")
    text = json.dumps(document)
    for ref in set(re.findall(r'"\$ref": "([^"]+)"', text)):
        assert ref.removeprefix("#/components/schemas/") in document["components"]["schemas"], ref
    for name, schema in document["components"]["schemas"].items():
        jsonschema_rs.meta.validate(schema)
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name)
    for _, path, call in operations(document):
        named = {p["name"] for p in call["parameters"] if p["in"] == "path"}
        assert named == set(re.findall(r"{(\w+)}", path))
        assert all(re.fullmatch(r"[1-5]\d\d", status) for status in call["responses"])


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Any:
    return jsonschema_rs.validator_for({**schema, "components": document["components"]})


async def test_every_example_is_one(document: dict[str, Any]) -> None:
    checked = 0
    for _, _, call in operations(document):
        bodies = [call.get("requestBody", {}), *call["responses"].values()]
        for media in (media for body in bodies for media in body.get("content", {}).values()):
            if "example" in media:
                validator(document, media["schema"]).validate(media["example"])
                checked += 1
    for item in document["webhooks"].values():
        media = item["post"]["requestBody"]["content"]["application/json"]
        validator(document, media["schema"]).validate(media["example"])
    assert checked >= 8


async def test_the_guides_own_calls_are_the_examples_and_do_what_they_say(api: Api, document: dict[str, Any]) -> None:
    made = document["paths"]["/v1/webhooks"]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert made["url"] == "https://yourapp.com/webhooks/trackpost"
    assert made["events"] == ["email.delivered", "email.bounced", "email.opened", "email.clicked"]
    assert (await api("POST", "/v1/webhooks", made)).status == 201
    emitted = document["paths"]["/v1/events"]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert (await api("POST", "/v1/events", emitted)).status == 201


async def test_what_arrives_is_described_for_each_type(parts: Web, document: dict[str, Any]) -> None:
    assert list(document["webhooks"]) == list(parts.catalogue.names())
    names = {p["name"] for p in document["webhooks"]["email.sent"]["post"]["parameters"]}
    assert {"X-Trackpost-Signature", "webhook-id", "webhook-timestamp", "webhook-signature"} <= names


# ── codes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def raised(file: Path) -> set[tuple[int, str]]:
    """(status, code) of each Problem that a file makes with both spelt out."""
    calls = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
    return {
        (call.args[0].value, call.args[1].value)
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "Problem" and len(call.args) > 1
        and isinstance(call.args[0], ast.Constant) and isinstance(call.args[1], ast.Constant)
    }  # fmt: skip


def test_every_code_is_listed_with_its_status_and_no_other() -> None:
    listed = {(status, code) for code, (status, _) in PROBLEMS.items()}
    used = set().union(*map(raised, SOURCES))
    assert used | {(PROBLEMS[code][0], code) for code in FROM_AIOHTTP} == listed


async def test_a_code_of_a_module_is_said_by_a_call_of_that_module(parts: Web) -> None:
    said: dict[str, set[str]] = {}
    for _, path, handler, operation in documented(build_api_app(parts)):
        assert operation is not None
        said.setdefault(handler.__module__.rpartition(".")[2], set()).update(problems_of(operation, path))
    for file in SOURCES:
        if file.stem in said:
            assert {code for _, code in raised(file)} <= said[file.stem], file.name


# ── served ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_document_is_served_at_both_places_without_a_key(api: Api, document: dict[str, Any]) -> None:
    for path in ("/v1/openapi.json", "/openapi.json"):
        served = await api("GET", path, key="")
        assert served.status == 200
        assert served.headers["Content-Type"].startswith("application/json")
        assert served.json == json.loads(json.dumps(document))
    assert (await api("GET", "/v1/openapi.json?x=1", key="")).status == 422


class Page(HTMLParser):
    """What a page fetches and where it leads."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.anchors: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.open += [] if tag in self.VOID else [tag]
        self.fetched += [given[name] or "" for name in ("src", "href") if name in given and tag != "a"]
        self.ids += [given["id"] or ""] if "id" in given else []
        href = given.get("href") or ""
        self.anchors += [href[1:]] if tag == "a" and href.startswith("#") else []
        assert "style" not in given
        assert not any(name.startswith("on") for name in given)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


async def test_the_page_tells_every_call_and_fetches_nothing_from_elsewhere(api: Api, document: dict[str, Any]) -> None:
    served = await api("GET", "/docs", key="")
    assert served.status == 200
    assert served.headers["Content-Type"] == "text/html; charset=utf-8"
    assert served.headers["Content-Security-Policy"] == POLICY
    assert "unsafe" not in POLICY
    assert POLICY.startswith("default-src 'none'")
    page = Page(served.text)
    assert page.open == []
    assert page.fetched == ["data:,", "/docs.css"]
    assert "script" not in page.tags
    assert len(set(page.ids)) == len(page.ids)
    assert set(page.anchors) <= set(page.ids)
    assert {call["operationId"] for _, _, call in operations(document)} <= set(page.ids)
    assert all(f"<code>{code}</code>" in served.text for code in set(PROBLEMS) - FROM_AIOHTTP)
    style = await api("GET", "/docs.css", key="")
    assert style.headers["Content-Type"].startswith("text/css")
    assert "url(" not in style.text


async def test_the_page_shows_what_the_catalogue_says_as_text(parts: Web) -> None:
    """An operator's own types are foreign text like any other."""
    file = {"event_types": [{"name": "a.b", "description": "<script>alert(1)</script>", "sample": {"x": "</pre><b>"}}]}
    parts.catalogue = parts.catalogue.with_files({"own.json": json.dumps(file)})
    async with TestClient(TestServer(build_api_app(parts))) as client, client.get("/docs") as response:
        text = await response.text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert Page(text).open == []


async def test_a_reload_of_the_catalogue_shows(api: Api) -> None:
    assert "invoice.paid" not in (await api("GET", "/docs", key="")).text
    file = {"event_types": [{"name": "invoice.paid", "description": "Paid", "sample": {}}]}
    api.parts.catalogue = api.parts.catalogue.with_files({"own.json": json.dumps(file)})
    assert "invoice.paid" in (await api("GET", "/docs", key="")).text
    assert "invoice.paid" in (await api("GET", "/openapi.json", key="")).json["webhooks"]
