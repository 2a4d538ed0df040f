from __future__ import annotations

import hashlib
import hmac
import json
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shell import Ended, Shell

from dispatcher.cli.receiver import (
    HANDLERS,
    as_express_prints,
    by_specification,
    stringify,
    verified_by_guide,
    verified_by_standard,
)
from dispatcher.core.rendering import render
from dispatcher.core.signing import Signer, new_secret
from dispatcher.model import BodyStyle

STYLES = {"express": BodyStyle.COMPACT, "flask": BodyStyle.PYTHON}
SECRET = new_secret(bytes(range(32)))
numbers = st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('019aé\n"\\', max_size=11), inner, max_size=4),
)


# ── the receiver ───────────────────────────────────────────────────────────────────────────────────────────────────


def signed(body: bytes, timestamp: float | None = None) -> dict[str, str]:
    at = str(int(time.time() if timestamp is None else timestamp))
    signer = Signer(SECRET)
    return {
        "X-Trackpost-Signature": signer.legacy(body).decode(),
        "webhook-id": "evt_1",
        "webhook-timestamp": at,
        "webhook-signature": signer.standard(b"evt_1", at.encode(), body).decode(),
    }


@given(st.dictionaries(st.text("019aé", max_size=11), values, max_size=5))
def test_both_handlers_verify_whatever_is_rendered_in_their_style(data: dict[str, Any]) -> None:
    from datetime import UTC, datetime

    for handler, style in STYLES.items():
        body = render(
            event_id="evt_1",
            type="a.b",
            created_at=datetime(2025, 1, 15, tzinfo=UTC),
            data=json.dumps(data),
            style=style,
        )
        assert verified_by_guide(body, signed(body), SECRET, HANDLERS[handler])
        other = HANDLERS["flask" if handler == "express" else "express"]
        assert not verified_by_guide(body, signed(body), SECRET, other)


@pytest.mark.parametrize("verifies", [verified_by_standard, by_specification])
def test_standard_signatures_are_verified_and_forged_or_old_ones_are_not(verifies: Any) -> None:
    body = b'{"id":"evt_1"}'
    assert verifies(body, signed(body), SECRET)
    assert not verifies(body + b" ", signed(body), SECRET)
    assert not verifies(body, signed(body), new_secret(bytes(32)))
    assert not verifies(body, signed(body, time.time() - 600), SECRET)
    assert not verifies(body, {**signed(body), "webhook-signature": ""}, SECRET)
    assert not verifies(body, {}, SECRET)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000])
def test_body_that_is_no_json_is_not_verified(body: bytes) -> None:
    headers = {"X-Trackpost-Signature": hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()}
    for printed in HANDLERS.values():
        assert not verified_by_guide(body, headers, SECRET, printed)


@pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine")
def test_express_handler_prints_as_node_does() -> None:
    texts = ['{"b":1,"10":2,"2":{"01":0,"4294967295":1,"4294967294":2}}', '["\\u007f\\u2028\\u0001\\"\\\\/é😀"]']
    numbers = (
        "1.0",
        "-0",
        "0.1",
        "1e21",
        "1e20",
        "123456789012345680000",
        "1e-6",
        "1e-7",
        "5e-324",
        "1.5e300",
        "-2.50",
    )
    texts += [f"[{number}]" for number in numbers]
    script = "for (const t of JSON.parse(process.argv[1])) console.log(JSON.stringify(JSON.parse(t)))"
    node = subprocess.run(["node", "-e", script, json.dumps(texts)], capture_output=True, check=True, text=True)
    assert [as_express_prints(text.encode()).decode() for text in texts] == node.stdout.split("\n")[:-1]


def test_stringify_keeps_the_order_of_keys_that_are_no_indexes() -> None:
    assert stringify({"b": 1.0, "1": 2.0, "a": [None, True], "0": ""}) == '{"0":"","1":2,"b":1,"a":[null,true]}'


# ── the demonstration ──────────────────────────────────────────────────────────────────────────────────────────────


def leftovers(shell: Shell) -> list[Path]:
    return list(shell.home.glob("dispatcher-*"))


def test_once_delivers_and_verifies_one_sample_of_each_type_and_leaves_nothing(shell: Shell) -> None:
    ended = shell.run("dispatcher", "demo", "--once")
    assert ended.code == 0, ended
    lines = [line for line in ended.out.splitlines() if "dlv_" in line]
    assert len(lines) == 26
    assert all(line.count("✓") == 2 for line in lines)
    assert len({line.split()[1] for line in lines}) == 13
    assert "26 deliveries of 13 event types: all delivered, both signatures of each verified." in ended.out
    assert ended.err == ""
    assert leftovers(shell) == []


def test_once_for_programs_is_an_object_for_each_delivery(shell: Shell) -> None:
    ended = shell.run("dispatcher", "demo", "--once", "--json", "--port", "0")
    assert ended.code == 0, ended
    landings = [json.loads(line) for line in ended.out.splitlines()]
    assert len({landing["delivery_id"] for landing in landings}) == len(landings) == 26
    assert all(landing["verified"] and landing["attempt"] == 1 and landing["latency_ms"] > 0 for landing in landings)


def test_port_that_is_taken_is_named(shell: Shell) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        ended = shell.run("dispatcher", "demo", "--port", str(port))
    assert ended.code == 2
    assert f"127.0.0.1:{port}" in ended.err
    assert "Traceback" not in ended.err
    assert leftovers(shell) == []


def test_others_reach_it_while_it_runs_and_ctrl_c_ends_it_however_often(shell: Shell) -> None:
    with shell.start("dispatcher", "demo", "--port", "0") as demo:
        try:
            told = _until(demo, "Ctrl-C ends it all")
            dsn = re.search(r"DISPATCHER_DATABASE_DSN='(.*)'", told)
            api = re.search(r"TRACKPOST_API_URL=(\S+) TRACKPOST_API_KEY=(\S+)", told)
            assert dsn, told
            assert api, told
            emitted = shell.run(
                "dispatcher", "emit", "own.type", "--data", '{"a": 1.0}', env={"DISPATCHER_DATABASE_DSN": dsn[1]}
            )
            first = _until(demo, "own.type")
            webhooks = _list_webhooks(shell, api[1], api[2])
            for _ in range(3):
                demo.send_signal(signal.SIGINT)
            _, err = demo.communicate(timeout=30)
        finally:
            demo.kill()
    assert emitted.code == 0, emitted
    assert "✓ ok   ✓ ok" in first
    assert [webhook["body_style"] for webhook in webhooks.json()["data"]] == ["python", "compact"]
    assert demo.returncode == 0
    assert err == ""
    assert leftovers(shell) == []


def _list_webhooks(shell: Shell, url: str, key: str) -> Ended:
    return shell.run("trackpost", "webhooks", "list", env={"TRACKPOST_API_URL": url, "TRACKPOST_API_KEY": key})


def _until(process: Any, words: str) -> str:
    """Everything up to and including the line with these words."""
    told = ""
    for line in process.stdout:
        told += line
        if words in line:
            return told
    raise AssertionError(f"it ended without {words!r}: {told}{process.stderr.read()}")


def test_ctrl_c_during_the_start_leaves_nothing(shell: Shell) -> None:
    with shell.start("dispatcher", "demo", "--port", "0") as demo:
        try:
            while not leftovers(shell):
                assert demo.poll() is None
            demo.send_signal(signal.SIGINT)
            _, err = demo.communicate(timeout=30)
        finally:
            demo.kill()
    assert (demo.returncode, err) == (0, "")
    assert leftovers(shell) == []
