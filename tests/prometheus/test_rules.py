"""Metrics, rules and alerts: judged by Prometheus' own tool, and held against what a running daemon says."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from promql import ALERTS, CONFIG, RULES, Selector, rules, selectors

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool (Debian: prometheus) is not on this machine")
ALERTING = {rule["alert"]: rule for rule in rules(ALERTS)}
RECORDED = {rule["record"] for rule in rules(RULES)}
SERIES_MAX = 100  # per family: none grows with accounts or webhooks, histograms of database operations are the largest
OF_PROMETHEUS = {"up"}


def promtool(*arguments: str, given: str | None = None) -> tuple[int, str]:
    done = subprocess.run(
        [str(PROMTOOL), *arguments], check=False, input=given, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


@needs_promtool
def test_promtool_finds_nothing_to_say_about_the_metrics(exposition: str) -> None:
    assert promtool("check", "metrics", given=exposition) == (0, "")


def test_no_family_has_many_series(exposition: str) -> None:
    families = {family.name: family.samples for family in text_string_to_metric_families(exposition)}
    many = {name: len(samples) for name, samples in families.items() if len(samples) > SERIES_MAX}
    assert set(many) <= {"dispatcher_database_seconds"}
    labels = {label for samples in families.values() for sample in samples for label in sample.labels}
    assert not labels & {"webhook", "endpoint", "account", "url", "host", "event", "type"}


@needs_promtool
def test_promtool_accepts_the_rules() -> None:
    code, said = promtool("check", "rules", str(RULES), str(ALERTS))
    assert code == 0, said


@needs_promtool
def test_promtool_accepts_the_scrape_example(tmp_path: Path) -> None:
    example = (CONFIG / "prometheus" / "scrape.yml").read_text()
    (tmp_path / "prometheus.yml").write_text(example.replace("/etc/prometheus/dispatcher", str(CONFIG / "prometheus")))
    code, said = promtool("check", "config", str(tmp_path / "prometheus.yml"))
    assert code == 0, said


def asked_for() -> list[tuple[str, Selector]]:
    named = [(rule.get("alert") or rule["record"], rule["expr"]) for path in (RULES, ALERTS) for rule in rules(path)]
    return [(name, selector) for name, expression in named for selector in selectors(expression)]


def test_every_rule_asks_for_something() -> None:
    assert {name for name, _ in asked_for()} == RECORDED | set(ALERTING)


@pytest.mark.parametrize(("rule", "selector"), asked_for())
def test_what_a_rule_asks_for_is_what_the_daemon_says(rule: str, selector: Selector, exposition: str) -> None:
    if selector.name in RECORDED | OF_PROMETHEUS:
        return
    samples = [s for family in text_string_to_metric_families(exposition) for s in family.samples]
    assert any(selector.matches(sample.name, sample.labels) for sample in samples), f"{rule} asks for nothing"


@pytest.mark.parametrize("rule", ALERTING.values(), ids=ALERTING)
def test_alerts_have_what_an_operator_needs(rule: dict[str, Any]) -> None:
    assert rule["alert"].startswith("Dispatcher")
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"].endswith(f"RUNBOOK.md#{rule['alert'].lower()}")


# Each alert fires when it should, not before it should, and not in good health


@dataclasses.dataclass(frozen=True)
class Trouble:
    """Series of one alert's trouble, in place of healthy ones, by promtool's notation: a value a minute."""

    series: Mapping[str, str]
    quiet_at: str  # when it is too early
    fires_at: str


HEALTHY = {
    'up{job="dispatcher", instance="a"}': "1x300",
    'dispatcher_active{job="dispatcher", instance="a"}': "1x300",
    'dispatcher_progress_age_seconds{job="dispatcher", instance="a"}': "1x300",
    'dispatcher_database_up{job="dispatcher", instance="a"}': "1x300",
    'dispatcher_database_losses_total{job="dispatcher", instance="a"}': "0x300",
    'process_start_time_seconds{job="dispatcher", instance="a"}': "1000x300",
    'process_open_fds{job="dispatcher", instance="a"}': "100x300",
    'process_max_fds{job="dispatcher", instance="a"}': "65536x300",
    'dispatcher_instances{job="dispatcher", instance="a", role="standby"}': "1x300",
    'dispatcher_build_info{job="dispatcher", instance="a", version="1"}': "1x300",
    'dispatcher_outbox_lag_seconds{job="dispatcher", instance="a"}': "0x300",
    'dispatcher_outbox_backlog{job="dispatcher", instance="a"}': "20x300",
    'dispatcher_oldest_pending_seconds{job="dispatcher", instance="a"}': "600x300",
    'dispatcher_event_loop_lag_seconds{job="dispatcher", instance="a"}': "0.001x300",
    'dispatcher_lanes{job="dispatcher", instance="a", state="ready"}': "50x300",
    'dispatcher_lanes{job="dispatcher", instance="a", state="dead"}': "3x300",
    'dispatcher_endpoints{job="dispatcher", instance="a", status="disabled"}': "2x300",
    'dispatcher_attempts_total{job="dispatcher", instance="a", result="2xx"}': "0+600x300",
    'dispatcher_attempts_total{job="dispatcher", instance="a", result="5xx"}': "0+30x300",
    'dispatcher_attempts_total{job="dispatcher", instance="a", result="tls"}': "0+6x300",
    'dispatcher_attempts_total{job="dispatcher", instance="a", result="dns"}': "0+6x300",
    'dispatcher_deliveries_total{job="dispatcher", instance="a", state="delivered"}': "0+600x300",
    'dispatcher_deliveries_total{job="dispatcher", instance="a", state="exhausted"}': "0+6x300",
    'dispatcher_delivery_latency_seconds_bucket{job="dispatcher", instance="a", le="1.0"}': "0+600x300",
    'dispatcher_delivery_latency_seconds_bucket{job="dispatcher", instance="a", le="10.0"}': "0+600x300",
    'dispatcher_delivery_latency_seconds_bucket{job="dispatcher", instance="a", le="+Inf"}': "0+600x300",
    'dispatcher_database_seconds_bucket{job="dispatcher", instance="a", operation="flush", le="0.1"}': "0+600x300",
    'dispatcher_database_seconds_bucket{job="dispatcher", instance="a", operation="flush", le="1.0"}': "0+600x300",
    'dispatcher_database_seconds_bucket{job="dispatcher", instance="a", operation="flush", le="+Inf"}': "0+600x300",
    'dispatcher_partitions_until_timestamp_seconds{job="dispatcher", instance="a", table="outbox"}': "604800x300",
    'dispatcher_default_partition_rows{job="dispatcher", instance="a", table="outbox"}': "0x300",
    'dispatcher_retention_last_run_timestamp_seconds{job="dispatcher", instance="a"}': "0+60x300",
    'dispatcher_state_filesystem_avail_bytes{job="dispatcher", instance="a"}': "50x300",
    'dispatcher_state_filesystem_size_bytes{job="dispatcher", instance="a"}': "100x300",
}


def of(name: str, **labels: str) -> str:
    """The series as HEALTHY spells it."""
    (found,) = [
        series
        for series in HEALTHY
        if series.startswith(f"{name}{{") and all(f'{key}="{value}"' in series for key, value in labels.items())
    ]
    return found


TROUBLES = {
    "DispatcherDown": Trouble({of("up"): "0x300"}, "1m", "3m"),
    "DispatcherNotDelivering": Trouble({of("dispatcher_active"): "0x300"}, "0m", "2m"),
    "DispatcherStuck": Trouble({of("dispatcher_progress_age_seconds"): "1 31+60x300"}, "1m", "3m"),
    "DispatcherDatabaseDown": Trouble({of("dispatcher_database_up"): "0x300"}, "0m", "2m"),
    "DispatcherDatabaseFlapping": Trouble({of("dispatcher_database_losses_total"): "0x30 0+1x100"}, "31m", "50m"),
    "DispatcherRestarting": Trouble({of("process_start_time_seconds"): "0x30 1+60x100"}, "32m", "40m"),
    "DispatcherStandbyMissing": Trouble({of("dispatcher_instances"): "0x300"}, "9m", "11m"),
    "DispatcherVersionsDiffer": Trouble(
        {'dispatcher_build_info{job="dispatcher", instance="b", version="2"}': "1x300"}, "59m", "61m"
    ),
    "DispatcherLagging": Trouble({of("dispatcher_outbox_lag_seconds"): "31x300"}, "4m", "6m"),
    "DispatcherBacklogGrowing": Trouble({of("dispatcher_outbox_backlog"): "9000+2000x300"}, "14m", "20m"),
    "DispatcherLatencyHigh": Trouble(
        {of("dispatcher_delivery_latency_seconds_bucket", le="1.0"): "0+60x300"}, "9m", "15m"
    ),
    "DispatcherOldestPendingTooOld": Trouble({of("dispatcher_oldest_pending_seconds"): "50000x300"}, "29m", "31m"),
    "DispatcherLedgerSlow": Trouble({of("dispatcher_database_seconds_bucket", le="0.1"): "0+60x300"}, "9m", "15m"),
    "DispatcherEventLoopLagging": Trouble({of("dispatcher_event_loop_lag_seconds"): "0.2x300"}, "4m", "10m"),
    "DispatcherAttemptsFailing": Trouble({of("dispatcher_attempts_total", result="5xx"): "0+1200x300"}, "14m", "20m"),
    "DispatcherExhaustedRateHigh": Trouble(
        {of("dispatcher_deliveries_total", state="exhausted"): "0+60x300"}, "14m", "20m"
    ),
    "DispatcherEndpointsDead": Trouble({of("dispatcher_lanes", state="dead"): "30x300"}, "14m", "16m"),
    "DispatcherWebhookDisabled": Trouble({of("dispatcher_endpoints"): "2x10 3x300"}, "10m", "20m"),
    "DispatcherTlsFailing": Trouble({of("dispatcher_attempts_total", result="tls"): "0+300x300"}, "9m", "15m"),
    "DispatcherDnsFailing": Trouble({of("dispatcher_attempts_total", result="dns"): "0+300x300"}, "9m", "15m"),
    "DispatcherPartitionHorizonShort": Trouble(
        {of("dispatcher_partitions_until_timestamp_seconds"): "200000x300"}, "59m", "61m"
    ),
    "DispatcherRowsAstray": Trouble({of("dispatcher_default_partition_rows"): "5x300"}, "59m", "61m"),
    "DispatcherRetentionStalled": Trouble(
        {of("dispatcher_retention_last_run_timestamp_seconds"): "0x300"}, "129m", "135m"
    ),
    "DispatcherDiskFilling": Trouble({of("dispatcher_state_filesystem_avail_bytes"): "9x300"}, "9m", "11m"),
    "DispatcherFilesShort": Trouble({of("process_open_fds"): "60000x300"}, "9m", "11m"),
}


def test_every_alert_has_its_trouble() -> None:
    assert set(TROUBLES) == set(ALERTING)


def firing(alert: str | None, at: str, *, expected: bool) -> dict[str, Any]:
    which = f'alertname="{alert}", ' if alert else ""
    return {
        "expr": f'count(ALERTS{{{which}alertstate="firing"}} == 1) > 0',
        "eval_time": at,
        "exp_samples": [{"labels": "{}", "value": 1}] if expected else [],
    }


def case(name: str, series: Mapping[str, str], asked: list[dict[str, Any]]) -> dict[str, Any]:
    inputs = [{"series": key, "values": value} for key, value in series.items()]
    return {"name": name, "interval": "1m", "input_series": inputs, "promql_expr_test": asked}


@needs_promtool
def test_alerts_fire_in_their_trouble_and_neither_before_nor_in_good_health(tmp_path: Path) -> None:
    cases = [case("good health", HEALTHY, [firing(None, "2h", expected=False)])]
    for alert, trouble in TROUBLES.items():
        asked = [firing(alert, trouble.quiet_at, expected=False), firing(alert, trouble.fires_at, expected=True)]
        cases.append(case(alert, {**HEALTHY, **trouble.series}, asked))
    file = tmp_path / "alerts_test.yml"  # JSON is YAML
    file.write_text(json.dumps({"rule_files": [str(RULES), str(ALERTS)], "evaluation_interval": "1m", "tests": cases}))
    code, said = promtool("test", "rules", str(file))
    assert code == 0, re.sub(r"(?s).*FAILED:", "", said)
