"""A JSON Schema as a table: a line for each field of the data, with what may stand there.

Operators bring schemas of their own, so anything may come. What this does not know stays unsaid here, and the schema
itself stands below the table.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

FIELDS_MAX: Final = 500
DEPTH_MAX: Final = 12
VALUES_SHOWN: Final = 12

_FORMATS: Final = {
    "email": "email address",
    "date-time": "date and time",
    "uri": "URL",
    "uuid": "UUID",
    "ipv4": "IPv4 address",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """One field: its path from the data on (`location.city`, `tags[]`), what it holds, whether it is always there."""

    path: str
    kind: str
    required: bool
    description: str
    values: tuple[str, ...]  # the only ones there are, if they are few

    @property
    def depth(self) -> int:
        """How far inside it is."""
        return self.path.count(".")


def fields(schema: Mapping[str, Any]) -> list[Field]:
    """The fields in the order of the schema."""
    found = []
    for field in _fields(schema, "", 0):
        found.append(field)
        if len(found) == FIELDS_MAX:
            break
    return found


def _fields(schema: Any, prefix: str, depth: int) -> Iterator[Field]:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(properties, Mapping) or depth > DEPTH_MAX:
        return
    required = schema.get("required")
    for name, given in properties.items():
        path = f"{prefix}{name}"
        inner = given if isinstance(given, Mapping) else {}
        yield Field(
            path,
            _kind(inner),
            isinstance(required, list) and name in required,
            str(inner.get("description", "")),
            _values(inner),
        )
        yield from _fields(inner, f"{path}.", depth + 1)
        yield from _fields(inner.get("items"), f"{path}[].", depth + 1)


def _kind(schema: Mapping[str, Any]) -> str:
    """What may stand there, in words."""
    kinds = schema.get("type")
    words = [kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if isinstance(kind, str)]
    if words == ["string"] and isinstance(schema.get("format"), str):
        return _FORMATS.get(schema["format"], str(schema["format"]))
    if words == ["array"] and isinstance(schema.get("items"), Mapping):
        return f"list of {_kind(schema['items'])}"
    return " or ".join("list" if word == "array" else word for word in words) or "any"


def _values(schema: Mapping[str, Any]) -> tuple[str, ...]:
    given = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if not isinstance(given, list) or len(given) > VALUES_SHOWN:
        return ()
    return tuple(value if isinstance(value, str) else json.dumps(value) for value in given)
