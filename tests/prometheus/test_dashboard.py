"""The dashboard: tidy, and every query of it answered by a real Prometheus that scrapes a real daemon."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from daemon_under_load import Running, free_port, until
from prometheus_client.parser import text_string_to_metric_families
from promql import ALERTS, DASHBOARD, RULES, rules, selectors

PROMETHEUS = shutil.which("prometheus")
needs_prometheus = pytest.mark.skipif(PROMETHEUS is None, reason="prometheus (Debian: prometheus) is not here")
DOCUMENT = json.loads(DASHBOARD.read_text())
PANELS = [panel for panel in DOCUMENT["panels"] if panel["type"] != "row"]
QUERIES = [(f"{panel['title']} {target['refId']}", target["expr"]) for panel in PANELS for target in panel["targets"]]
QUERIES += [(each["name"], each["expr"]) for each in DOCUMENT["annotations"]["list"]]
COMPARES = {"Restarts"}  # whether there is something to show is what they ask


def filled_in(expression: str) -> str:
    """The expression as Grafana sends it."""
    return expression.replace("$__rate_interval", "10s").replace("$job", "dispatcher").replace("$instance", ".*")


# The document


def test_rows_are_those_that_an_operator_looks_for() -> None:
    rows = [panel["title"] for panel in DOCUMENT["panels"] if panel["type"] == "row"]
    assert rows == ["Flow", "Latency", "Retries", "Database", "Process"]


def test_panels_neither_overlap_nor_leave_the_page() -> None:
    places = [panel["gridPos"] for panel in DOCUMENT["panels"]]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


def test_ids_are_unique() -> None:
    ids = [panel["id"] for panel in DOCUMENT["panels"]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: f"{panel['title']}")
def test_a_panel_says_what_it_shows_and_in_what_unit(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    refs = [target["refId"] for target in panel["targets"]]
    assert len(refs) == len(set(refs))
    for each in (panel, *panel["targets"]):
        assert each["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_every_variable_is_declared() -> None:
    declared = {variable["name"] for variable in DOCUMENT["templating"]["list"]}
    assert declared == {"datasource", "job", "instance"}
    for title, expression in QUERIES:
        assert "$" not in filled_in(expression), title


# Its queries


@pytest.mark.parametrize(("title", "expression"), QUERIES, ids=[title for title, _ in QUERIES])
def test_what_a_panel_asks_for_is_what_the_daemon_says(title: str, expression: str, exposition: str) -> None:
    samples = [s for family in text_string_to_metric_families(exposition) for s in family.samples]
    for selector in selectors(filled_in(expression)):
        if selector.name != "ALERTS":
            assert any(selector.matches(sample.name, sample.labels) for sample in samples), selector


class Prometheus:
    """A real one, which scrapes twice a second and knows our rules."""

    def __init__(self, address: str) -> None:
        self._address = address

    def get(self, path: str, **arguments: str) -> Any:
        url = f"http://{self._address}{path}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.loads(answer.read())["data"]
        except urllib.error.HTTPError as error:
            if error.code == 503:  # not ready yet
                raise
            pytest.fail(f"{arguments}: {error.read().decode()}")

    def values(self, expression: str) -> list[float]:
        result = self.get("/api/v1/query", query=expression)["result"]
        return [float(series["value"][1]) for series in result]

    def is_up(self) -> bool:
        with contextlib.suppress(OSError):
            return self.values('up{job="dispatcher"}') == [1.0]
        return False


@pytest.fixture(scope="module")
def prometheus(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    directory: Path = tmp_path_factory.mktemp("prometheus")
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(RULES), str(ALERTS)],
        "scrape_configs": [{"job_name": "dispatcher", "static_configs": [{"targets": [running.metrics]}]}],
    }
    (directory / "prometheus.yml").write_text(json.dumps(config))
    address = f"127.0.0.1:{free_port()}"
    command = [str(PROMETHEUS), f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"]
    process = subprocess.Popen(
        [*command, f"--web.listen-address={address}", "--log.level=error"], cwd=directory, stderr=subprocess.DEVNULL
    )
    it = Prometheus(address)
    try:
        until(it.is_up, "Prometheus to have scraped")
        yield it
    finally:
        process.terminate()
        process.wait()


def shows(prometheus: Prometheus, expression: str) -> Callable[[], bool]:
    """Whether there is something to draw: NaN is what a division by no traffic gives."""
    return lambda: any(map(math.isfinite, prometheus.values(filled_in(expression))))


@needs_prometheus
def test_prometheus_answers_every_query_with_data(prometheus: Prometheus) -> None:
    for title, expression in QUERIES:
        if title in COMPARES:
            prometheus.values(filled_in(expression))
        else:
            until(shows(prometheus, expression), f"data for {title}: {filled_in(expression)}")


@needs_prometheus
def test_prometheus_evaluates_every_rule(prometheus: Prometheus) -> None:
    def evaluated() -> bool:
        found = [rule for group in prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]]
        assert not [rule["lastError"] for rule in found if rule.get("lastError")]
        return len(found) == len(rules(RULES)) + len(rules(ALERTS)) and all(rule["health"] == "ok" for rule in found)

    until(evaluated, "every rule to be evaluated")
    for rule in rules(RULES):
        until(shows(prometheus, rule["record"]), f"what {rule['record']} records")
