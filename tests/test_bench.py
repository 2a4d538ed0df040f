"""The benchmark harness counts right: the books of a smoke run, and what figures are made of. Never how fast."""

from __future__ import annotations

import base64
import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from standardwebhooks import Webhook

from bench import __main__ as bench_command
from bench.__main__ import _keep
from bench.histogram import STEPS, Histogram, bucket_of, edge_of
from bench.ledger import FOREIGN, Ledger, endpoint_path, event_id, event_type
from bench.machine import ROOT
from bench.plot import columns, lines, quantiles
from bench.producer import Stream
from bench.report import Report
from bench.scenario import all_scenarios
from bench.scenarios.peers import postgres_variables

# A drain, an open loop, ill endpoints, retries, and kill -9: every way in which the harness counts.
SCENARIOS = ("throughput", "light", "isolation", "retries", "recovery")

SVG = "{http://www.w3.org/2000/svg}"

durations = st.lists(st.integers(0, 10**12), min_size=1, max_size=200)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a smoke run by scenario."""
    results = tmp_path_factory.mktemp("results")
    done = bench("smoke", "--quiet", "--results", str(results), "--only", *SCENARIOS)
    assert done.returncode == 0, done.stdout + done.stderr
    return {found["scenario"]: found for found in (json.loads(path.read_text()) for path in results.glob("*.json"))}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_delivery_of_a_smoke_run_is_accounted_for(smoke: dict[str, Any], scenario: str) -> None:
    found = smoke[scenario]
    assert not found["is_void"], found["faults"]
    assert found["books"], "no books were closed"
    for cell, books in found["books"].items():
        assert books["sent"] > 0, cell
        assert books["sent"] == books["received"] + books["missing"], cell
        assert (books["missing"], books["foreign"]) == (0, 0), cell
        assert books["acknowledged"] == books["committed"], cell


def test_without_a_fault_nothing_is_delivered_twice(smoke: dict[str, Any]) -> None:
    assert [books["duplicates"] for books in smoke["throughput"]["books"].values()] == [0] * 4


def test_every_latency_of_the_steady_phase_is_in_the_histogram(smoke: dict[str, Any]) -> None:
    (histogram,) = smoke["light"]["histograms"].values()
    sizes = all_scenarios()["light"].sizes(smoke=True)
    assert len(Histogram.from_json(histogram)) == sizes["rate"] * sizes["seconds"]


def test_no_retry_of_a_storm_is_early(smoke: dict[str, Any]) -> None:
    assert {bar["what"]: bar["value"] for bar in smoke["retries"]["bars"]}["early retries"] == 0


def test_a_run_says_on_what_it_was_made(smoke: dict[str, Any]) -> None:
    for found in smoke.values():
        assert {"cpu", "cores", "kernel", "python", "uvloop", "asyncpg", "git"} <= set(found["machine"])
        assert found["versions"]["PostgreSQL"]
        assert found["versions"]["PostgreSQL settings"]["fsync"] == "on"
        assert found["receiver ceiling"]["requests/s"] > 0


# What is left of a run.


def test_results_that_cannot_be_written_are_said_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = bench("light", "--results", str(tmp_path / "file"))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"no results can be written to {tmp_path / 'file'}" in done.stderr


def test_of_results_for_which_there_is_no_room_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report("light", "what?", {})
    report.row("cell", {"per second": 1.0})
    report.column("1/s", "cell", 1.0)

    def write_half(path: Path, text: str, **_: object) -> None:
        path.write_bytes(text.encode()[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", write_half)
        with pytest.raises(OSError, match="No space left"):
            report.save(tmp_path, {})
        printed = io.StringIO()
        console = Console(file=printed)
        _keep(report, tmp_path, cast("Any", SimpleNamespace(surroundings=dict)), console)
    assert not report.is_kept
    assert "No space left" in printed.getvalue()
    assert list(tmp_path.iterdir()) == []
    report.save(tmp_path, {})
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".svg"]


def test_two_runs_of_one_second_keep_a_file_each(tmp_path: Path) -> None:
    report = Report("light", "what?", {})
    assert report.save(tmp_path, {}) != report.save(tmp_path, {})
    assert len(list(tmp_path.iterdir())) == 2


def test_a_smoke_run_judges_nothing(tmp_path: Path) -> None:
    report = Report("light", "what?", {})
    report.bar("far off", 2.0, at_most=1.0)
    found = json.loads(report.save(tmp_path, {}, is_smoke=True).read_text())
    assert (found["is_smoke"], [bar["is_met"] for bar in found["bars"]]) == (True, [None])


@pytest.mark.parametrize("columns", [40, 80, 160])
def test_a_narrow_terminal_shows_every_figure(columns: int) -> None:
    report = Report("light", "what?", {})
    for n, cell in enumerate(("first", "second")):
        report.row(cell, {f"column {m} of many": 1000 * n + m + 0.25 for m in range(12)})
    printed = io.StringIO()
    report.show(Console(file=printed, width=columns))
    for n in range(2):
        assert all(f"{1000 * n + m + 0.25:{',.0f' if n else '.3g'}}" in printed.getvalue() for m in range(12))
    assert max(map(len, printed.getvalue().splitlines())) <= columns
    assert "…" not in printed.getvalue()


def test_what_a_run_says_is_shown_as_it_is() -> None:
    report = Report("light", "what?", {})
    report.row("[bold]", {"[red]": 1})
    report.void("cell", "[error   ] no [/var/tmp/x]")
    report.note("[database] dsn")
    printed = io.StringIO()
    report.show(Console(file=printed, width=80))
    for text in ("[bold]", "[red]", "[error   ] no [/var/tmp/x]", "[database] dsn"):
        assert text in printed.getvalue()


@pytest.mark.parametrize(
    "arguments",
    [
        ["throughput", "--events", "0"],
        ["throughput", "--endpoints", "15"],
        ["throughput", "--cell", "3x7"],
        ["transport", "--shapes", "0x0"],
        ["peers", "--which", "foo"],
        ["light", "--rate", "many"],
        ["light", "--dsn", "postgresql:///", "--postgres-bin", "/usr"],
    ],
    ids=" ".join,
)
def test_sizes_that_make_no_run_are_refused_before_it(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_command.main(arguments)
    assert ended.value.code == 2
    assert f"argument {arguments[-2]}: " in capsys.readouterr().err


def test_a_server_that_cannot_be_reached_is_said_in_a_line(tmp_path: Path) -> None:
    done = bench("light", "--dsn", "postgresql://me@127.0.0.1:1/x", "--results", str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("PostgreSQL cannot be reached: ")


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_nothing_behind(by: signal.Signals, tmp_path: Path) -> None:
    where = "--directory", str(tmp_path), "--results", str(tmp_path / "results")
    command = [sys.executable, "-m", "bench", "recovery", "--rate", "200", "--quiet", *where]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started: list[int] = []
    deadline = time.monotonic() + 60
    while len(started) < 3 and time.monotonic() < deadline:  # receiver, daemon, producer; the server below them
        time.sleep(0.1)
        started = _children(running.pid)
    running.send_signal(by)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 128 + by, said
    assert said.splitlines()[-1] == f"stopped by {by.name}"
    assert len(started) >= 3
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def _children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# The ledger.


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    made = Ledger(tmp_path / "ledger", events=4, fanout=3)
    yield made
    made.close()


DATA = {"a": 1}


def receive(
    ledger: Ledger, event: int, endpoint: int, *, group: int | None = None, secret: bytes = b"", body: bytes = b""
) -> None:
    """What the receiver's process does, through a mapping of its own: an event of a group comes to an endpoint."""
    from bench.receiver import Connection, Told

    told = Told(secret=secret, data=DATA)
    told.ledger = Ledger(ledger.path, ledger.events, ledger.fanout)
    connection = Connection(told)
    connection._write = lambda data: None
    type_ = event_type(endpoint // ledger.fanout if group is None else group)
    body = body or json.dumps({"id": event_id(event), "type": type_, "data": DATA}).encode()
    now = datetime.now(UTC)
    signature = Webhook(base64.b64encode(b"s3cret").decode()).sign(event_id(event), now, body.decode())
    lines = (
        f"POST {endpoint_path(endpoint)} HTTP/1.1", f"X-Trackpost-Event: {type_}", f"webhook-id: {event_id(event)}",
        f"webhook-timestamp: {int(now.timestamp())}", f"webhook-signature: {signature}", f"Content-Length: {len(body)}",
    )  # fmt: skip
    whole = "\r\n".join([*lines, "", ""]).encode() + body
    connection.data_received(whole[:50])
    connection.data_received(whole[50:-1])
    connection.data_received(whole[-1:])
    told.ledger.close()


def test_what_did_not_come_is_missing_and_what_came_twice_a_duplicate(ledger: Ledger) -> None:
    for event in range(3):
        ledger.acked[event] = 1
    for endpoint in (3, 4, 5):
        receive(ledger, 0, endpoint)
        receive(ledger, 1, endpoint)
    receive(ledger, 1, 5)
    receive(ledger, 2, 4)
    books = ledger.balance(range(4), committed=3)
    assert (books.sent, books.received, books.missing, books.duplicates) == (9, 7, 2, 1)
    assert (ledger.requests, ledger.distinct) == (8, 7)
    assert books.faults == ["2 of 9 deliveries are missing"]


def test_a_request_nobody_sent_voids_the_run(ledger: Ledger) -> None:
    for event in range(4):
        ledger.acked[event] = 1
        for endpoint in range(3):
            receive(ledger, event, endpoint)
    assert ledger.balance(range(4), committed=4).faults == []
    receive(ledger, 4711, 0)
    assert ledger.head[FOREIGN] == 1
    assert ledger.balance(range(4), committed=4).faults == ["1 requests came that nobody sent"]


def whole(ledger: Ledger) -> None:
    """Every event comes to every endpoint of the first group."""
    for event in range(4):
        ledger.acked[event] = 1
        for endpoint in range(3):
            receive(ledger, event, endpoint, secret=b"s3cret")


def test_a_signed_event_at_its_webhook_is_genuine(ledger: Ledger) -> None:
    whole(ledger)
    books = ledger.balance(range(4), committed=4)
    assert (books.faults, books.examined) == ([], 3)


def test_an_event_at_another_webhook_voids_the_run(ledger: Ledger) -> None:
    whole(ledger)
    receive(ledger, 1, 1, group=1)
    assert ledger.balance(range(4), committed=4).faults == ["1 requests came to another webhook than the event was for"]


@pytest.mark.parametrize(
    ("secret", "body"),
    [
        (b"another", b""),
        (b"s3cret", b"{}"),
        (b"s3cret", b"not JSON"),
        (b"s3cret", json.dumps({"id": event_id(1), "type": event_type(0), "data": DATA}).encode()),
        (b"s3cret", json.dumps({"id": event_id(0), "type": event_type(0), "data": {}}).encode()),
    ],
    ids=["signed by another", "empty", "not JSON", "another event", "without its data"],
)
def test_a_request_that_is_not_what_is_promised_voids_the_run(ledger: Ledger, secret: bytes, body: bytes) -> None:
    whole(ledger)
    receive(ledger, 0, 1, secret=secret, body=body)
    assert ledger.balance(range(4), committed=4).faults == ["1 of 4 examined requests had a wrong signature or body"]


def test_events_the_database_does_not_hold_void_the_run(ledger: Ledger) -> None:
    ledger.acked[0] = 1
    for endpoint in range(3):
        receive(ledger, 0, endpoint)
    assert ledger.balance(range(4), committed=0).faults == ["the database holds 0 events, 1 were acknowledged"]


def test_a_latency_counts_from_when_the_event_was_due(ledger: Ledger) -> None:
    ledger.due[1], ledger.acked[1] = 100, 130
    ledger.first[3], ledger.first[5] = 150, 190
    assert ledger.latencies_ns([1]) == [50, 90]
    assert ledger.latencies_ns([1], since="acked") == [20, 60]


def test_ids_and_types_are_such_as_the_outbox_takes() -> None:
    assert event_id(7) == "evt_" + "7".rjust(32, "0")
    assert event_type(12) == "bench.g00012"
    assert [Stream(first=10, count=4, rate=1, group=2, groups=3).group_of(n) for n in range(10, 14)] == [2, 3, 4, 2]


# Histograms and plots.


@given(st.integers(0, 10**15))
def test_a_bucket_holds_its_durations_within_a_64th(value: int) -> None:
    edge = edge_of(bucket_of(value))
    assert value <= edge <= value * (1 + 1 / STEPS) + 1
    assert bucket_of(edge + 1) == bucket_of(value) + 1


@given(durations, st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_that_of_the_sorted_list_within_a_64th(values: list[int], share: float) -> None:
    exact = sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]
    assert exact <= Histogram(values).quantile_ns(share) <= exact * (1 + 1 / STEPS) + 1


@given(durations, durations)
def test_pooling_is_the_same_as_having_counted_together(left: list[int], right: list[int]) -> None:
    pooled = Histogram(left)
    pooled.add(Histogram(right))
    together = Histogram(left + right)
    assert (pooled.buckets, pooled.highest_ns) == (together.buckets, together.highest_ns)
    assert Histogram.from_json(json.loads(json.dumps(pooled.to_json()))).buckets == together.buckets


@pytest.mark.parametrize(
    "drawing",
    [
        quantiles("a <title> & more", {"idle": Histogram(range(1, 10**7, 10**4)), "none": Histogram()}),
        columns("rates", {"one": {"a": 3.0, "b": 2.0}, "two": {"a": 0.0}}, "1/s"),
        lines("memory", {"RSS, MB": [(0.0, 60.0), (5.0, 80.5)], "p99, ms": [(0.0, 1.0), (5.0, 2.0)]}),
    ],
    ids=["quantiles", "columns", "lines"],
)
def test_a_plot_is_well_formed_svg_that_stays_on_its_page(drawing: str) -> None:
    root = ET.fromstring(drawing)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    points = [pair.split(",") for line in root.iter(f"{SVG}polyline") for pair in line.attrib["points"].split()]
    assert points or next(root.iter(f"{SVG}rect"), None) is not None
    assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in points)


def test_scenarios_have_a_question_and_a_smoke_size_for_everything() -> None:
    for scenario in all_scenarios().values():
        assert scenario.question.endswith("?"), scenario.name
        assert scenario.sizes().keys() == scenario.sizes(smoke=True).keys()


def test_a_dsn_becomes_the_variables_of_other_clients() -> None:
    assert postgres_variables("postgresql://me:p%40ss@db.example:5433/app?sslmode=require") == {
        "PGHOST": "db.example",
        "PGPORT": "5433",
        "PGUSER": "me",
        "PGPASSWORD": "p@ss",
        "PGDATABASE": "app",
        "PGSSLMODE": "require",
    }
