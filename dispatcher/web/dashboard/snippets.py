"""Handlers to start from: for a type of event and a body style, in the frameworks that the guide names.

Each one runs as it stands once `WEBHOOK_SECRET` is set, and does what a handler must: it verifies before it believes,
compares in constant time, answers at once, and shows where to recognise duplicates. Where a framework parses the body
first, hashing what it prints again is right only in the body style that is its language's own. In the other one, and
without a framework, the raw bytes are hashed, which is right in every style.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Final

from dispatcher.core.catalogue import EventType
from dispatcher.model import BodyStyle

FIELDS_SHOWN: Final = 8

_is_word: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII).fullmatch


@dataclasses.dataclass(frozen=True, slots=True)
class Snippet:
    """One handler: for what, in which language, why it hashes what it hashes, and the code."""

    key: str  # unique among a page's snippets
    name: str
    language: str
    note: str
    code: str


def snippets(kind: EventType, style: BodyStyle, header_prefix: str) -> list[Snippet]:
    """The handlers for events of one type, sent in one body style."""
    return list(_snippets(kind, style, f"{header_prefix}Signature"))


def _snippets(kind: EventType, style: BodyStyle, header: str) -> Iterator[Snippet]:
    is_compact = style is BodyStyle.COMPACT
    values = {"HEADER": header, "HEADER_LOWER": header.lower(), "TYPE": kind.name, "FIELDS": _fields(kind)}
    values |= {"JS": _logged(kind, "event.data.{}"), "PY": _logged(kind, 'event["data"].get("{}")')}
    printed = 'Hashes the parsed body as the language prints it, which body style "{}" is made for.'
    raw = "Hashes the raw bytes, which is right in every body style."
    yield Snippet(
        "express",
        "Express",
        "JavaScript",
        printed.format(style) if is_compact else raw,
        _filled(_EXPRESS_PARSED if is_compact else _EXPRESS_RAW, values),
    )
    yield Snippet(
        "flask",
        "Flask",
        "Python",
        raw if is_compact else printed.format(style),
        _filled(_FLASK_RAW if is_compact else _FLASK_PARSED, values),
    )
    yield Snippet("lambda", "AWS Lambda", "JavaScript", raw, _filled(_LAMBDA, values))
    yield Snippet("raw", "Raw body", "JavaScript", f"Node alone. {raw}", _filled(_NODE, values))


def _fields(kind: EventType) -> str:
    """What the data holds, for a comment. Names that are no words are left out: they could end the comment."""
    names = [name for name in kind.sample if _is_word(name)]
    return ", ".join(names[:FIELDS_SHOWN]) + (", …" if len(names) > FIELDS_SHOWN else "") if names else "see the sample"


def _logged(kind: EventType, access: str) -> str:
    """The first field as code reads it, for an example of what to do."""
    name = next((name for name in kind.sample if _is_word(name)), None)
    return f", {access.format(name)}" if name else ""


def _filled(template: str, values: dict[str, str]) -> str:
    return re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], template).strip() + "\n"


_JS_GENUINE: Final = """\
function isGenuine(bytes, signature) {
  const expected = crypto.createHmac('sha256', process.env.WEBHOOK_SECRET).update(bytes).digest();
  const given = Buffer.from(signature ?? '', 'hex');
  return given.length === expected.length && crypto.timingSafeEqual(given, expected);
}
"""

_JS_HANDLE: Final = """\
function handle(event) {
  // event.id is the same on every attempt: remember it, and skip what you have seen.
  switch (event.type) {
    case '@TYPE@':
      // event.data: @FIELDS@
      console.log(event.id, event.type@JS@);
      break;
  }
}
"""

_EXPRESS_PARSED: Final = f"""\
const crypto = require('crypto');
const express = require('express');
const app = express();

{_JS_GENUINE}
app.post('/webhooks', express.json({{ limit: '1mb' }}), (req, res) => {{
  if (!isGenuine(JSON.stringify(req.body), req.get('@HEADER@'))) return res.sendStatus(401);
  res.sendStatus(200); // answer first, work later
  handle(req.body);
}});

{_JS_HANDLE}
app.listen(process.env.PORT ?? 3000);
"""

_EXPRESS_RAW: Final = f"""\
const crypto = require('crypto');
const express = require('express');
const app = express();

{_JS_GENUINE}
app.post('/webhooks', express.raw({{ type: 'application/json', limit: '1mb' }}), (req, res) => {{
  if (!isGenuine(req.body, req.get('@HEADER@'))) return res.sendStatus(401);
  res.sendStatus(200); // answer first, work later
  handle(JSON.parse(req.body));
}});

{_JS_HANDLE}
app.listen(process.env.PORT ?? 3000);
"""

_LAMBDA: Final = f"""\
const crypto = require('crypto');

exports.handler = async (request) => {{
  const body = Buffer.from(request.body ?? '', request.isBase64Encoded ? 'base64' : 'utf8');
  const signature = request.headers['@HEADER_LOWER@'] ?? request.headers['@HEADER@'];
  if (!isGenuine(body, signature)) return {{ statusCode: 401, body: 'Invalid signature' }};
  handle(JSON.parse(body));
  return {{ statusCode: 200, body: 'OK' }};
}};

{_JS_GENUINE}
{_JS_HANDLE}
"""

_NODE: Final = f"""\
const crypto = require('crypto');
const http = require('http');

{_JS_GENUINE}
{_JS_HANDLE}
http.createServer((req, res) => {{
  const chunks = [];
  let size = 0;
  req.on('data', (chunk) => {{
    size += chunk.length;
    if (size > 1 << 20) req.destroy(); // no event is as large
    else chunks.push(chunk);
  }});
  req.on('end', () => {{
    const body = Buffer.concat(chunks); // the bytes as they came: parse only after verifying
    const genuine = isGenuine(body, req.headers['@HEADER_LOWER@']);
    res.writeHead(genuine ? 200 : 401).end();
    if (genuine) handle(JSON.parse(body));
  }});
}}).listen(process.env.PORT ?? 3000);
"""

_FLASK_HEAD: Final = """\
import hashlib
import hmac
import json
import os

from flask import Flask, request

app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = 1 << 20  # no event is as large
SECRET = os.environ["WEBHOOK_SECRET"].encode()


def is_genuine(body: bytes, signature: str) -> bool:
    expected = hmac.new(SECRET, body, hashlib.sha256).hexdigest()
    return hmac.compare_digest(signature.encode(), expected.encode())
"""

_FLASK_HANDLE: Final = """\
def handle(event):
    # event["id"] is the same on every attempt: remember it, and skip what you have seen.
    match event["type"]:
        case "@TYPE@":
            # event["data"]: @FIELDS@
            print(event["id"], event["type"]@PY@)
"""

_FLASK_PARSED: Final = f"""\
{_FLASK_HEAD}

@app.post("/webhooks")
def webhook():
    if not is_genuine(json.dumps(request.json).encode(), request.headers.get("@HEADER@", "")):
        return "Invalid signature", 401
    handle(request.json)
    return "OK"


{_FLASK_HANDLE}

if __name__ == "__main__":
    app.run(port=int(os.environ.get("PORT", "3000")))
"""

_FLASK_RAW: Final = f"""\
{_FLASK_HEAD}

@app.post("/webhooks")
def webhook():
    body = request.get_data()
    if not is_genuine(body, request.headers.get("@HEADER@", "")):
        return "Invalid signature", 401
    handle(json.loads(body))
    return "OK"


{_FLASK_HANDLE}

if __name__ == "__main__":
    app.run(port=int(os.environ.get("PORT", "3000")))
"""
