from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.core.catalogue import OWN_TYPES, Catalogue, EventType, nearest
from dispatcher.core.rendering import is_type
from dispatcher.errors import ConfigurationError

BUILTIN = Catalogue.builtin()
DOCUMENTED = (
    *("email.sent", "email.delivered", "email.opened", "email.clicked", "email.bounced", "email.complained"),
    *("email.dropped", "template.created", "template.updated", "template.deleted"),
    *("domain.verified", "api_key.created", "api_key.revoked"),
)


def document(*entries: object) -> str:
    return json.dumps({"event_types": list(entries)})


def mistakes(*texts: str) -> list[str]:
    with pytest.raises(ConfigurationError) as refused:
        BUILTIN.with_files({f"{number}.json": text for number, text in enumerate(texts)})
    return refused.value.problems


PAID = {"name": "invoice.paid", "description": "Invoice paid", "sample": {"invoice_id": "inv_1"}}


# A validator of exactly the keywords the built-in schemas use; any other one fails the test.

PYTHON_TYPES = {"string": str, "integer": int, "boolean": bool, "array": list, "object": dict}


def is_of_type(name: str, value: Any) -> bool:
    return isinstance(value, PYTHON_TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def is_date_time(text: str) -> bool:
    return text.endswith("Z") and datetime.fromisoformat(text).tzinfo is not None


FORMATS: dict[str, Callable[[str], object]] = {
    "date-time": is_date_time,
    "email": lambda text: re.fullmatch(r"[^@\s]+@[a-z0-9.-]+\.[a-z]+", text),
    "hostname": lambda text: re.fullmatch(r"([a-z0-9-]+\.)+[a-z]+", text),
    "uri": lambda text: re.fullmatch(r"https?://\S+", text),
}


def violations(schema: Mapping[str, Any], value: Any, path: str = "data") -> Iterator[str]:
    known = {
        "$schema",
        "type",
        "description",
        "properties",
        "required",
        "items",
        "enum",
        "format",
        "pattern",
        "minimum",
    }
    yield from (f"{path}: keyword {keyword}" for keyword in schema.keys() - known)
    if not is_of_type(schema["type"], value):
        yield f"{path}: not of type {schema['type']}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: not in enum"
    if "format" in schema and not FORMATS[schema["format"]](value):
        yield f"{path}: not a {schema['format']}"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{path}: pattern"
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{path}: below minimum"
    yield from (f"{path}.{key}: missing" for key in schema.get("required", ()) if key not in value)
    for key, inner in schema.get("properties", {}).items():
        if key in value:
            yield from violations(inner, value[key], f"{path}.{key}")
    if "items" in schema:
        for place, item in enumerate(value):
            yield from violations(schema["items"], item, f"{path}[{place}]")


def test_the_thirteen_documented_types_are_built_in() -> None:
    assert BUILTIN.names() == DOCUMENTED
    assert len(BUILTIN) == 13
    assert [one.name for one in BUILTIN] == list(DOCUMENTED)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_built_in_type_is_described_and_its_sample_fits_its_schema(name: str) -> None:
    found = BUILTIN.get(name)
    assert found is not None
    assert is_type(found.name)
    assert found.description
    assert found.when
    assert found.schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert list(violations(found.schema, found.sample)) == []
    assert set(found.sample) == set(found.schema["properties"]), "a sample shows every field"
    assert set(found.schema["required"]) <= set(found.schema["properties"])


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("email.sent", "to", "nobody"),
        ("email.sent", "tags", "welcome"),
        ("email.sent", "tags", [1]),
        ("email.bounced", "bounce_type", "squishy"),
        ("email.delivered", "delivered_at", 5),
        ("email.opened", "location", {"country": "usa"}),
        ("template.created", "version", 0),
        ("template.created", "version", True),
    ],
)
def test_the_validator_of_these_tests_sees_mistakes(name: str, key: str, value: object) -> None:
    found = BUILTIN.get(name)
    assert found is not None
    assert list(violations(found.schema, {**found.sample, key: value}))
    assert list(violations(found.schema, {other: found.sample[other] for other in found.sample if other != "to"})) or (
        "to" not in found.schema["required"]
    )


def test_samples_are_the_documented_payloads() -> None:
    found = BUILTIN.get("email.bounced")
    assert found is not None
    assert json.dumps(found.sample) == (
        '{"email_id": "msg_def456", "to": "user@example.com", "bounced_at": "2025-01-15T10:30:05Z",'
        ' "bounce_type": "hard", "reason": "User not found",'
        ' "smtp_response": "550 5.1.1 The email account does not exist"}'
    )


def test_an_operator_s_types_come_after_the_built_in_ones() -> None:
    catalogue = BUILTIN.with_files({"own.json": document(PAID)})
    assert catalogue.names() == (*DOCUMENTED, "invoice.paid")
    assert catalogue.get("invoice.paid") == EventType(
        name="invoice.paid",
        description="Invoice paid",
        when="",
        schema={"type": "object"},
        sample={"invoice_id": "inv_1"},
    )
    assert catalogue.check_filter("invoice.paid") is None
    assert BUILTIN.names() == DOCUMENTED


def test_an_operator_s_type_replaces_the_built_in_one_in_its_place() -> None:
    catalogue = BUILTIN.with_files({"own.json": document({**PAID, "name": "email.sent"})})
    assert catalogue.names() == DOCUMENTED
    found = catalogue.get("email.sent")
    assert found is not None
    assert found.description == "Invoice paid"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "0.json: expected JSON: "),
        ("{", "0.json: expected JSON: "),
        ('{"event_types": [NaN]}', "0.json: expected JSON: NaN is not a JSON number"),
        ("[]", '0.json: expected an object with "event_types" and nothing else'),
        ('{"event_types": [], "x": 1}', '0.json: expected an object with "event_types" and nothing else'),
        ('{"event_types": {}}', "0.json: event_types: expected a list"),
        (document("invoice.paid"), "0.json: event_types[0]: expected an object, not invoice.paid"),
        (document(PAID, PAID), "0.json: event_types[1]: name: invoice.paid is there twice"),
        (document({**PAID, "smaple": {}}), "0.json: event_types[0]: smaple: unknown, expected one of name, desc"),
        (document({**PAID, "name": 5}), "0.json: event_types[0]: name: expected text, not 5"),
        (document({**PAID, "sample": [1]}), "0.json: event_types[0]: sample: expected an object, not [1]"),
        (document({**PAID, "schema": True}), "0.json: event_types[0]: schema: expected an object, not true"),
        (document({**PAID, "name": "Invoice"}), "0.json: event_types[0]: name: expected dotted lower-case words"),
        (document({**PAID, "name": "webhook.failing"}), "0.json: event_types[0]: name: webhook.failing is emitted by"),
    ],
)
def test_a_mistaken_document_says_where_and_what(text: str, problem: str) -> None:
    [found] = mistakes(text)
    assert found.startswith(problem)


def test_every_mistake_of_every_document_is_told_at_once() -> None:
    found = mistakes(document(PAID, {"when": 1}), "{", document(PAID))
    assert [text.split(": expected JSON")[0] for text in found] == [
        "0.json: event_types[1]: name: missing",
        "0.json: event_types[1]: description: missing",
        "0.json: event_types[1]: when: expected text, not 1",
        "0.json: event_types[1]: sample: missing",
        "1.json",
        "2.json: event_types[0]: name: invoice.paid is there twice",
    ]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("email.delivred", "email.delivered"),
        ("email.Bounced", "email.bounced"),
        ("delivered", "email.delivered"),
        ("email_opened", "email.opened"),
        ("apikey.created", "api_key.created"),
        ("email.sent", "email.sent"),
        ("zzz", None),
        ("", None),
        ("é" * 100_000, None),
    ],
)
def test_the_nearest_name_is_the_one_probably_meant(name: str, meant: str | None) -> None:
    assert nearest(name, BUILTIN.names()) == meant


@pytest.mark.parametrize("text", ["*", "email.*", "billing.eu.*", "x.*", *DOCUMENTED, *OWN_TYPES])
def test_right_filters_pass(text: str) -> None:
    assert BUILTIN.check_filter(text) is None


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("email.delivred", 'did you mean "email.delivered"?'),
        ("EMAIL.SENT", 'did you mean "email.sent"?'),
        ("email", 'did you mean "email.*"?'),
        ("email*", 'did you mean "email.*"?'),
        ("webhook.failed", 'did you mean "webhook.failing"?'),
        ("invoice.paid", 'expected a known type, "*", or a prefix like "email.*"'),
        ("", 'expected a known type, "*", or a prefix like "email.*"'),
        ("**", 'expected a known type, "*", or a prefix like "email.*"'),
    ],
)
def test_a_wrong_filter_gets_the_nearest_name(text: str, hint: str) -> None:
    assert BUILTIN.check_filter(text) == f'"{text}" is not an event type: {hint}'


@given(st.text())
def test_any_text_is_a_filter_or_gets_a_short_printable_answer(text: str) -> None:
    problem = BUILTIN.check_filter(text)
    assert problem is None or (problem.isascii() and problem.isprintable() and len(problem) < 1200)


def test_a_catalogue_names_its_types() -> None:
    assert repr(Catalogue([])) == "<Catalogue >"
    assert repr(BUILTIN).startswith("<Catalogue email.sent, email.delivered, ")
