"""The catalogue's pages, whatever an operator's own files say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dispatcher.core.catalogue import Catalogue, EventType
from dispatcher.web.dashboard.schemas import fields

if TYPE_CHECKING:
    from tests.web.dashboard.conftest import Browser, House

SCHEMA = {
    "type": "object",
    "required": ["id", "place"],
    "properties": {
        "id": {"type": "string", "description": "Which <b>one</b>"},
        "at": {"type": "string", "format": "date-time"},
        "kind": {"enum": ["hard", "soft", None]},
        "place": {"type": "object", "properties": {"city": {"type": ["string", "null"]}}, "required": ["city"]},
        "lines": {"type": "array", "items": {"type": "object", "properties": {"sum": {"type": "number"}}}},
        "anything": True,
    },
}


def test_a_schema_becomes_a_line_for_each_field():
    assert [(one.path, one.kind, one.required, one.values) for one in fields(SCHEMA)] == [
        ("id", "string", True, ()),
        ("at", "date and time", False, ()),
        ("kind", "any", False, ("hard", "soft", "null")),
        ("place", "object", True, ()),
        ("place.city", "string or null", True, ()),
        ("lines", "list of object", False, ()),
        ("lines[].sum", "number", False, ()),
        ("anything", "any", False, ()),
    ]


@pytest.mark.parametrize("odd", [{}, {"properties": []}, {"properties": {"a": 1}, "required": 5}, {"type": 7}])
def test_an_odd_schema_is_no_mistake_of_ours(odd):
    assert [one.path for one in fields(odd)] in ([], ["a"])


def test_a_schema_inside_itself_ends_somewhere():
    deep: dict = {"type": "object"}
    for _ in range(50):
        deep = {"type": "object", "properties": {"a": deep, "b": deep}}
    assert len(fields(deep)) <= 500


async def test_every_type_has_a_page_in_both_styles(browser: Browser):
    listed = (await browser.get("/event-types")).text
    for kind in Catalogue.builtin():
        assert f'href="/event-types/{kind.name}"' in listed
        for style in ("compact", "python", "odd"):
            page = await browser.get(f"/event-types/{kind.name}?style={style}")
            assert page.status == 200
            assert kind.description in page.words
            assert ("express.json(" in page.text) == (style != "python")


async def test_an_operators_type_is_shown_and_is_no_markup(house: House, browser: Browser):
    own = EventType(
        name="crm.note", description="<script>alert(1)</script>", schema=SCHEMA, sample={"a": "</pre><img>"}
    )
    house.parts.catalogue = Catalogue([own])
    page = await browser.get("/event-types/crm.note")
    assert "Which <b>one</b>" in page.words
    assert "<script>alert" not in page.text
    assert "<img>" not in page.text


async def test_a_test_goes_to_the_chosen_webhook(house: House, browser: Browser):
    assert "add a webhook" in (await browser.get("/event-types/email.sent")).words
    webhook = await house.webhook(url="https://chosen.example/")
    page = await browser.get("/event-types/email.sent")
    assert f'<option value="{webhook["id"]}">https://chosen.example/' in page.text
    answer = await browser.get(f"/event-types/email.sent/test?webhook={webhook['id']}")
    assert answer.location == f"/webhooks/{webhook['id']}/test?type=email.sent"
    assert (await browser.get("/event-types/email.sent/test?webhook=//evil.example")).status == 404


async def test_a_type_that_is_not_there(browser: Browser):
    assert (await browser.get("/event-types/email.none")).status == 404
