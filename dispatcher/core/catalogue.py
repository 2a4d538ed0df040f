"""The event types that are known: what each means, what its data looks like, an example of it.

The catalogue informs people and catches typing mistakes; it decides nothing at delivery, since an application may emit
any type. `event_types.json` beside this file holds the built-in types, in the same format an operator's own files have:

    {"event_types": [{"name": "invoice.paid", "description": "Invoice paid", "when": "When the money has arrived",
                      "schema": {"type": "object"}, "sample": {"invoice_id": "inv_1"}}]}

`schema` (JSON Schema 2020-12 of the event's `data`) and `when` may be left out.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from typing import Any, Final, NoReturn

from dispatcher.core.rendering import TYPE_BYTES_MAX, is_type
from dispatcher.core.routing import valid_filter
from dispatcher.errors import ConfigurationError

# Emitted about a webhook itself. Webhooks may ask for them by name, but they are no part of the customer's catalogue.
OWN_TYPES: Final = ("webhook.failing", "webhook.disabled")

_FIELDS: Final = {"name": str, "description": str, "when": str, "schema": dict, "sample": dict}
_REQUIRED: Final = frozenset({"name", "description", "sample"})
_WORDS: Final = {str: "text", dict: "an object"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EventType:
    """One type of event. `schema` and `sample` are about the event's `data` and must not be changed."""

    name: str
    description: str
    when: str = ""
    schema: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"type": "object"})
    sample: Mapping[str, Any]


class Catalogue:
    """The event types by name, in the order they were given."""

    def __init__(self, types: Iterable[EventType]) -> None:
        self._types: Final = {one.name: one for one in types}

    @classmethod
    def builtin(cls) -> Catalogue:
        """The types this program comes with."""
        text = resources.files("dispatcher.core").joinpath("event_types.json").read_text("utf-8")
        return cls(()).with_files({"event_types.json": text})

    def with_files(self, texts: Mapping[str, str]) -> Catalogue:
        """This catalogue and the types of further documents, text by file name.

        A type that is here already is replaced; one that two of the documents hold is a mistake. Raises
        ConfigurationError with every mistake there is.
        """
        added: dict[str, EventType] = {}
        problems: list[str] = []
        for file, text in texts.items():
            for where, entry in _entries(file, text, problems):
                found = list(_entry_problems(entry))
                if not found and entry["name"] in added:
                    found = [f"name: {entry['name']} is there twice"]
                problems += [f"{where}: {problem}" for problem in found]
                if not found:
                    added[entry["name"]] = EventType(**entry)
        if problems:
            raise ConfigurationError(problems)
        return Catalogue((self._types | added).values())

    def __len__(self) -> int:
        return len(self._types)

    def __iter__(self) -> Iterator[EventType]:
        return iter(self._types.values())

    def __repr__(self) -> str:
        return f"<Catalogue {', '.join(self._types)}>"

    def names(self) -> tuple[str, ...]:
        """The names of all types."""
        return tuple(self._types)

    def get(self, name: str) -> EventType | None:
        """The type of that name; None if it is not known."""
        return self._types.get(name)

    def check_filter(self, text: str) -> str | None:
        """What is wrong with this entry of a webhook's `events`; None if nothing is.

        Right are `*`, known types, and prefixes like `email.*`, whether or not a known type begins with them.
        """
        if text in self._types or text in OWN_TYPES or (valid_filter(text) and not is_type(text)):
            return None
        groups = {f"{name.split('.')[0]}.*": None for name in self._types}
        meant = nearest(text, (*self._types, *OWN_TYPES, *groups))
        hint = f'did you mean "{meant}"?' if meant else 'expected a known type, "*", or a prefix like "email.*"'
        return f'"{_shown(text)}" is not an event type: {hint}'


def nearest(text: str, candidates: Iterable[str]) -> str | None:
    """The candidate that was probably meant; None if nothing comes close."""
    # Cut to what a type can be: the comparison takes time by the square of the length.
    close = difflib.get_close_matches(text[:TYPE_BYTES_MAX].lower(), list(candidates), n=1)
    return close[0] if close else None


def _entries(file: str, text: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Each entry of a document with the words for where it stands."""
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        problems.append(f"{file}: expected JSON: {error}")
        return
    if not isinstance(document, dict) or set(document) != {"event_types"}:
        problems.append(f'{file}: expected an object with "event_types" and nothing else')
    elif not isinstance(document["event_types"], list):
        problems.append(f"{file}: event_types: expected a list")
    else:
        yield from ((f"{file}: event_types[{place}]", entry) for place, entry in enumerate(document["event_types"]))


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _entry_problems(entry: Any) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield f"expected an object, not {_shown(entry)}"
        return
    yield from (f"{_shown(key)}: unknown, expected one of {', '.join(_FIELDS)}" for key in entry if key not in _FIELDS)
    for key, kind in _FIELDS.items():
        if key in entry and not isinstance(entry[key], kind):
            yield f"{key}: expected {_WORDS[kind]}, not {_shown(entry[key])}"
        elif key not in entry and key in _REQUIRED:
            yield f"{key}: missing"
    name = entry.get("name")
    if isinstance(name, str) and not is_type(name):
        yield f"name: expected dotted lower-case words like invoice.paid, not {_shown(name)}"
    if name in OWN_TYPES:
        yield f"name: {name} is emitted by the dispatcher itself"


def _shown(value: object) -> str:
    """What was given, fit for a message: short and printable."""
    text = value if isinstance(value, str) else json.dumps(value)
    return ascii(text if len(text) <= 80 else f"{text[:77]}...")[1:-1]
