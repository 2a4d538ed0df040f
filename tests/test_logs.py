"""The log: lines that cannot be forged, hold no secret, and never keep anybody waiting."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import structlog

from dispatcher import logs
from dispatcher.config import Log
from dispatcher.logs import Outlet, Wide, start_logging

PATIENCE_S = 60.0


@pytest.fixture
def stream(log_stream: io.StringIO) -> io.StringIO:
    return log_stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


# ── both doors ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_line_begins_with_the_same_four_keys_through_either_door(stream: io.StringIO) -> None:
    start_logging(Log(format="json"), stream)
    structlog.get_logger("dispatcher.a").info("said", b=1)
    Wide("dispatcher.a").write(logging.INFO, "said", {"b": 1})
    logging.getLogger("somebody.else").warning("said %s", "too")
    first, second, third = lines(stream)
    assert list(first) == list(second) == ["timestamp", "level", "event", "logger", "b"]
    assert first | {"timestamp": ""} == second | {"timestamp": ""}
    assert len(first["timestamp"]) == len(second["timestamp"]) == len("2026-01-01T00:00:00.000000Z")
    assert (third["event"], third["logger"]) == ("said too", "somebody.else")


def test_level_is_that_of_the_settings_and_changes_while_running(stream: io.StringIO) -> None:
    wide = Wide("dispatcher.a")
    start_logging(Log(format="json", level="warning"), stream)
    assert not wide.is_on(logging.INFO)
    wide.write(logging.INFO, "no", {})
    start_logging(Log(format="json", level="info"), stream)
    wide.write(logging.INFO, "yes", {})
    assert [line["event"] for line in lines(stream)] == ["yes"]


# ── injection ────────────────────────────────────────────────────────────────────────────────────────────────────────

EVIL = [
    'a\n{"event": "forged"}',
    "a\r\nforged",
    "a\x1b[2J\x1b]0;title\x07",
    "a\u2028forged\u2029",
    "a\x85forged",
    "a\x9b31m",
    "a\u202egnp.exe",
    "a\x00b",
    "a\x7fb",
    "lone \ud800 surrogate",
]


@pytest.mark.parametrize("evil", EVIL)
@pytest.mark.parametrize("format_", ["json", "text"])
def test_nothing_that_is_said_can_begin_a_line_or_move_the_cursor(stream: io.StringIO, evil: str, format_: str) -> None:
    start_logging(Log(format=format_), stream)
    structlog.get_logger("dispatcher.a").info("said", error=evil)
    structlog.get_logger("dispatcher.a").info(evil, nested=[evil], mapped={"k": evil})
    Wide("dispatcher.a").write(logging.INFO, "said", {"error": evil})
    logging.getLogger("somebody.else").warning("%s", evil)
    text = stream.getvalue()
    assert len(text.splitlines()) == text.count("\n") == 4
    assert all(c.isprintable() for line in text.split("\n") for c in line)
    if format_ == "json":
        assert text.isascii()
        assert lines(stream)[0]["error"] == lines(stream)[2]["error"] == evil, "a machine gets it back whole"


@pytest.mark.parametrize("format_", ["json", "text"])
def test_traceback_forges_no_line_and_shows_no_local_variable(stream: io.StringIO, format_: str) -> None:
    start_logging(Log(format=format_), stream)
    hidden = "whsec_" + "h" * 32

    def fail(holds: str) -> None:
        raise ValueError(f"a\n2026-01-01 forged\x1b[2J {len(holds)}")

    try:
        fail(hidden)
    except ValueError:
        structlog.get_logger("dispatcher.a").exception("failed")
    text = stream.getvalue()
    assert hidden not in text
    assert "\x1b" not in text
    assert not [line for line in text.split("\n") if line.startswith("2026-01-01 forged")]
    assert "ValueError" in text


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SECRETS = [
    "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "tp_live_0123456789abcdefghijklmnop",
    "acme_test_0123456789abcdefghijklmnop",
    "Authorization: Bearer abcdef.0123456789-xyz",
    "postgresql://me:hunter2@hunter2@db.example/app",
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("format_", ["json", "text"])
def test_what_looks_like_a_credential_is_masked(stream: io.StringIO, secret: str, format_: str) -> None:
    start_logging(Log(format=format_), stream)
    structlog.get_logger("dispatcher.a").info("said", error=f"refused {secret}, sorry")
    Wide("dispatcher.a").write(logging.INFO, "said", {"error": f"refused {secret}, sorry"})
    logging.getLogger("somebody.else").warning("refused %s, sorry", secret)
    error = ValueError(f"refused {secret}, sorry")
    structlog.get_logger("dispatcher.a").error("failed", exc_info=error)
    for bare in ("MfKQ9r8GKY", "0123456789", "hunter2"):
        assert bare not in stream.getvalue()
    assert stream.getvalue().count("***") == 4
    assert stream.getvalue().count("***, sorry") + stream.getvalue().count("db.example/app, sorry") == 4


def test_ids_are_no_secrets(stream: io.StringIO) -> None:
    start_logging(Log(format="json"), stream)
    ids = ["evt_01a2081fe9447c2e", "dlv_live_ish", "wh_01a2", "key_01a2081fe9447c2eb4479be5", "https://a.example/b@c"]
    for each in ids:
        Wide("dispatcher.a").write(logging.INFO, "said", {"id": each})
    assert [line["id"] for line in lines(stream)] == ids


# ── streams that do not take it ──────────────────────────────────────────────────────────────────────────────────────


def test_full_pipe_costs_lines_and_no_time_and_says_so_when_it_is_read_again() -> None:
    read, write = os.pipe()
    outlet = Outlet(write, lines_max=50)
    outlet.tell = lambda dropped: f"dropped {dropped}"
    said = 5000
    for number in range(said):  # 500 KB into a pipe of 64 KiB: a write that waited would never return
        outlet.put(f"{number:05} {'x' * 94}")
    assert 0 < outlet.dropped < said
    got: list[str] = []
    with os.fdopen(read, encoding="ascii") as pipe:
        while len(got) < said - outlet.dropped:
            got.append(pipe.readline().rstrip("\n"))
        outlet.put("after")
        while got[-1] != "after":
            got.append(pipe.readline().rstrip("\n"))
    told = sum(int(line.split()[1]) for line in got if line.startswith("dropped"))
    numbers = [int(line.split()[0]) for line in got if line[:5].isdigit()]
    assert numbers == sorted(set(numbers))
    assert len(numbers) + told == said
    os.close(write)


def test_pipe_nobody_reads_any_more_ends_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    outlet = Outlet(write)
    outlet.put("into the void")
    assert outlet.flush(PATIENCE_S)
    assert outlet.dropped == 1
    assert capfd.readouterr().err == ""
    os.close(write)


def test_full_disk_costs_lines_and_what_comes_later_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without room takes half a line and then nothing."""
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    room = 8
    full = threading.Event()
    write = os.write

    def limited(to: int, data: memoryview) -> int:
        nonlocal room
        if to != descriptor or full.is_set():
            return write(to, data)
        if room == 0:
            raise OSError(28, "No space left on device")
        written = write(to, data[:room])
        room -= written
        return written

    monkeypatch.setattr(logs.os, "write", limited)
    outlet = Outlet(descriptor)
    outlet.tell = lambda dropped: f"dropped {dropped}"
    outlet.put("half a line that does not fit")
    assert outlet.flush(PATIENCE_S)
    full.set()
    outlet.put("whole")
    assert outlet.flush(PATIENCE_S)
    assert path.read_text() == "half a l\ndropped 1\nwhole\n"
    os.close(descriptor)


def test_device_without_room_is_survived() -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    outlet = Outlet(descriptor)
    outlet.put("no room")
    assert outlet.flush(PATIENCE_S)
    assert outlet.dropped == 1
    os.close(descriptor)


PROGRAM = """
import structlog
from dispatcher.config import Log
from dispatcher.logs import start_logging
start_logging(Log(format="json"))
for number in range(3000):
    structlog.get_logger("dispatcher.a").info("said", number=number, padding="x" * 100)
print("went on", flush=True)
"""


def test_program_whose_standard_error_nobody_reads_goes_on_and_ends() -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"went on\n"
    assert process.wait(PATIENCE_S) == 0
    process.stdout.close()
    assert process.stderr is not None
    process.stderr.close()


def test_program_that_is_read_loses_no_line_at_its_end() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True, timeout=PATIENCE_S)
    assert [json.loads(line)["number"] for line in done.stderr.splitlines()] == list(range(3000))


# ── what it is made of ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("before", ["", "import rich"])
def test_rich_is_left_where_it_was(before: str) -> None:
    code = f"{before}\nimport sys, dispatcher.logs; print('rich' in sys.modules); import rich.traceback"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == f"{bool(before)}\n"
