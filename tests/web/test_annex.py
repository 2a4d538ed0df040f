"""The dashboard's place: what it serves, and when it is loaded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from dispatcher.web import annex
from dispatcher.web.annex import Annex
from dispatcher.web.boundary import boundary
from dispatcher.web.problems import Problem

PAGE = {"Accept": "text/html"}

Client = TestClient[Any, Any]


class Dashboard:
    """In the real one's place: two pages, one of which breaks."""

    made = 0
    closed = 0

    def __init__(self, *parts: object) -> None:
        type(self).made += 1

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/", self.show), web.get("/pages/{name}", self.show), web.post("/broken", self.fail)]

    async def show(self, request: web.Request) -> web.Response:
        return web.Response(text=request.match_info.get("name", "front"))

    async def fail(self, request: web.Request) -> web.Response:
        raise Problem(409, "conflict", "Not now.")

    async def error_page(self, request: web.Request, problem: Problem) -> web.Response:
        return web.Response(status=problem.status, text=f"page of {problem.status}", content_type="text/html")

    def close(self) -> None:
        type(self).closed += 1


async def answer(request: web.Request) -> web.Response:
    return web.json_response({})


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> type[Dashboard]:
    monkeypatch.setattr(Dashboard, "made", 0)
    monkeypatch.setattr(Dashboard, "closed", 0)
    monkeypatch.setattr(annex, "_load", lambda: Dashboard)
    return Dashboard


@pytest.fixture
async def client(loaded: type[Dashboard]) -> AsyncIterator[Client]:
    it = Annex(*([None] * 3))  # type: ignore[arg-type]
    v1 = web.Application()
    v1.add_routes([web.get("/things", answer)])
    app = web.Application(middlewares=[boundary, it.middleware()])
    app.add_routes([web.get("/docs", answer)])
    app.add_subapp("/v1", v1)
    app.router.register_resource(it)
    app.on_shutdown.append(it.close)
    async with TestClient(TestServer(app)) as client:
        yield client


async def test_programs_do_not_load_it(client: Client, loaded: type[Dashboard]) -> None:
    for path, status in ("/docs", 200), ("/v1/things", 200), ("/v1/nothing", 404):
        assert (await client.get(path)).status == status
    await client.close()
    assert (loaded.made, loaded.closed) == (0, 0)


async def test_pages_asked_for_at_once_are_loaded_once(client: Client, loaded: type[Dashboard]) -> None:
    answers = await asyncio.gather(*(client.get(path) for path in ("/", "/pages/a", "/pages/b", "/")))
    assert [await each.text() for each in answers] == ["front", "a", "b", "front"]
    await client.close()
    assert (loaded.made, loaded.closed) == (1, 1)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("POST", "/", {"GET", "HEAD"}), ("GET", "/broken", {"POST"}), ("POST", "/docs", {"GET", "HEAD"})],
)
async def test_another_method_is_told_which_there_are(
    client: Client, method: str, path: str, allowed: set[str]
) -> None:
    answer = await client.request(method, path)
    assert answer.status == 405
    assert set(answer.headers["Allow"].split(",")) == allowed


async def test_what_nobody_serves_is_not_found(client: Client) -> None:
    assert (await (await client.get("/nothing")).json())["code"] == "not_found"


@pytest.mark.parametrize(("method", "path", "status"), [("POST", "/broken", 409), ("GET", "/nothing", 404)])
async def test_people_are_told_by_a_page(client: Client, method: str, path: str, status: int) -> None:
    answer = await client.request(method, path, headers=PAGE)
    assert (answer.status, await answer.text()) == (status, f"page of {status}")


async def test_programs_are_told_in_json_whatever_they_accept(client: Client, loaded: type[Dashboard]) -> None:
    answer = await client.get("/v1/nothing", headers=PAGE)
    assert (answer.status, answer.content_type) == (404, "application/problem+json")
    assert loaded.made == 0


async def test_what_cannot_be_loaded_is_a_fault_of_ours_each_time(
    client: Client, loaded: type[Dashboard], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> type[Dashboard]:
        raise ImportError("jinja2 is gone")

    monkeypatch.setattr(annex, "_load", fail)
    assert (await client.get("/")).status == 500
    monkeypatch.setattr(annex, "_load", lambda: loaded)
    assert (await client.get("/")).status == 200
