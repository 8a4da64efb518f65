"""What is deployed fits the program: metrics that exist, flags that exist, and containers that may do little."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cloud_server.__main__ import _parser
from cloud_server.metrics import Metrics
from cloud_server.worker import WorkerLoad

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "tandem.json"
OURS = re.compile(r"\b(?:vllm:|tandem_|http_)\w+")
LABELS = re.compile(r"(\w+)=~?\"")
PROMETHEUS_OWN = {"instance", "job", "le"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """docker-compose.yml, its anchors resolved."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return found


def series() -> dict[str, set[str]]:
    """Every name that /metrics can have, with its labels."""
    metrics = Metrics("m")
    metrics.watch(WorkerLoad, lambda: False)
    found: dict[str, set[str]] = {}
    for collector in metrics.registry._collector_to_names:
        labels = set(getattr(collector, "_labelnames", ()))
        for name in metrics.registry._collector_to_names[collector]:
            found[name] = labels
    return found


def expressions() -> Iterator[str]:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    rules = yaml.safe_load((ROOT / "deploy" / "alerts.yml").read_text())["groups"][0]["rules"]
    yield from (rule["expr"] for rule in rules)


def test_dashboard_and_alerts_ask_for_metrics_that_exist() -> None:
    known, asked = series(), set()
    for expression in expressions():
        names = set(OURS.findall(expression))
        assert names <= set(known), expression
        asked |= names
        labels = {label for name in names for label in known[name]} | PROMETHEUS_OWN
        assert set(LABELS.findall(expression)) <= labels, expression
        for group in re.findall(r"by \(([\w, ]+)\)", expression):
            assert set(group.split(", ")) <= labels, expression
    assert len(asked) > 20


def test_the_dashboard_is_one_that_grafana_reads() -> None:
    board = json.loads(DASHBOARD.read_text())
    assert board["uid"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    for panel in board["panels"]:
        assert panel["datasource"]["uid"] == source["datasources"][0]["uid"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24


def test_two_servers_list_each_other_and_share_keys_but_no_port(compose: dict[str, Any]) -> None:
    one, two = compose["services"]["cloud-1"], compose["services"]["cloud-2"]
    assert "--peer=https://cloud-2:8000" in one["command"]
    assert "--peer=https://cloud-1:8000" in two["command"]
    assert not set(one["ports"]) & set(two["ports"])
    assert [port.rsplit("/")[1] for port in one["ports"]] == ["udp", "tcp", "tcp"]
    assert one["volumes"] == two["volumes"]
    assert all(volume.endswith(":ro") for volume in one["volumes"])


@pytest.mark.parametrize("name", ["cloud-1", "cloud-2"])
def test_the_commands_in_it_are_commands(compose: dict[str, Any], name: str) -> None:
    command = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", part) for part in compose["services"][name]["command"]]
    given = _parser().parse_args(command)
    assert given.drain < float(compose["services"][name]["stop_grace_period"].rstrip("s"))


def test_every_container_is_bounded_and_may_gain_nothing(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["mem_limit"], name
        assert service["pids_limit"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["logging"]["options"]["max-size"], name
        if "build" in service:
            assert service["read_only"], name


def test_the_image_runs_as_nobody_in_particular() -> None:
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    assert "USER 10001:10001" in lines
    assert lines.index("USER 10001:10001") > max(at for at, line in enumerate(lines) if line.startswith("RUN"))
    assert sum(line.startswith("FROM ${BASE}") for line in lines) == 2
