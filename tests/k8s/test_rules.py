"""Alerts fire when they should and not when they should not; every query is one that Prometheus can read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.monitoring import dashboards, generate, rules
from tests.k8s.manifests import K8S, build, named, pods
from tests.lanes import missing

ALERTS = {rule["alert"]: rule for group in rules.groups() for rule in group["rules"] if "alert" in rule}
QUERIES = [(board.name, query) for board in dashboards.ALL for query in board.queries]


def promtool() -> str:
    """Prometheus' own checker."""
    program = shutil.which("promtool")
    if program is None:
        missing("there is no promtool (apt-get install prometheus)")
    return program


def _promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([promtool(), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", sorted(generate.files()))
def test_what_is_generated_is_in_the_checkout(name: str) -> None:
    text = (generate.FOLDER / name).read_text(encoding="utf-8")
    assert text == generate.files()[name], "say: make dashboards"


@pytest.mark.prometheus
def test_prometheus_reads_the_rules() -> None:
    done = _promtool("check", "rules", generate.FOLDER / "prometheus-rules.yaml")
    assert done.returncode == 0, done.stderr


@pytest.mark.prometheus
def test_prometheus_reads_every_query_of_a_dashboard(tmp_path: Path) -> None:
    recording = [
        {"record": f"{board}:query{number}", "expr": query} for number, (board, query) in enumerate(QUERIES)
    ]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": recording}]}), encoding="utf-8")
    done = _promtool("check", "rules", path)
    assert done.returncode == 0, done.stderr
    assert f"{len(QUERIES)} rules found" in done.stdout


@pytest.mark.prometheus
def test_a_query_that_cannot_be_read_is_caught(tmp_path: Path) -> None:
    path = tmp_path / "queries.yaml"
    broken = QUERIES[0][1].replace(":", "(", 1) + "["
    path.write_text(yaml.safe_dump({"groups": [{"name": "q", "rules": [{"record": "a", "expr": broken}]}]}))
    assert _promtool("check", "rules", path).returncode


def _names(expression: str) -> set[str]:
    """Metrics and recorded series that an expression asks for."""
    without = re.sub(r'"[^"]*"|\[[^\]]*\]|\bby \([^)]*\)', "", expression)
    return set(
        re.findall(r"\b(?:ray_|accord_feedback_|accord_rollout_|accord:|kuberay_|kubelet_)[\w:]+", without)
    )


ASKED = {name for _, query in QUERIES for name in _names(query)} | {
    name for group in rules.groups() for rule in group["rules"] for name in _names(rule["expr"])
}


def test_what_is_recorded_is_what_is_asked_for() -> None:
    recorded = {rule["record"] for group in rules.groups() for rule in group["rules"] if "record" in rule}
    assert recorded == {name for name in ASKED if name.startswith("accord:")}


def test_what_is_asked_for_is_scraped() -> None:
    """The monitor drops what its expression does not name."""
    monitor = named(build("overlays/production"), "PodMonitor", "ray")
    (keep,) = [
        relabeling["regex"]
        for relabeling in monitor["spec"]["podMetricsEndpoints"][0]["metricRelabelings"]
        if relabeling["action"] == "keep"
    ]
    assert [name for name in ASKED if name.startswith("ray_") and not re.fullmatch(keep, name)] == []


def test_monitors_name_ports_that_pods_have() -> None:
    manifests = build("overlays/production")
    ports = {
        port["name"] for pod in pods(manifests) if pod.is_rays for port in pod.spec["containers"][0]["ports"]
    }
    for endpoint in named(manifests, "PodMonitor", "ray")["spec"]["podMetricsEndpoints"]:
        assert endpoint["port"] in ports
    service = {port["name"] for port in named(manifests, "Service", "feedback")["spec"]["ports"]}
    for endpoint in named(manifests, "ServiceMonitor", "feedback")["spec"]["endpoints"]:
        assert endpoint["port"] in service


def test_a_metric_of_ours_is_one_that_a_service_has() -> None:
    folders = [K8S.parent / name for name in ("services", "ray_jobs")]
    sources = "".join(path.read_text(encoding="utf-8") for one in folders for path in one.rglob("*.py"))
    for name in sorted(ASKED):
        ours = re.fullmatch(r"(?:ray_)?accord_(feedback_)?(\w+)", name)
        if ours:
            short = re.sub(r"_(total|bucket|sum|count)$", "", ours[2])
            assert re.search(rf'"(accord_)?(feedback_)?{short}(_total)?"', sources), name


def test_the_latency_objective_is_a_bound_of_the_histogram() -> None:
    sources = (K8S.parent / "services" / "metrics.py").read_text(encoding="utf-8")
    bounds = re.search(r"_SECONDS = \[([^\]]*)\]", sources)
    assert bounds
    assert float(rules.LATENCY_S) in [float(bound) for bound in bounds[1].split(",")]


def test_every_alert_has_a_runbook_entry() -> None:
    page = (K8S.parent / rules.RUNBOOK).read_text(encoding="utf-8")
    headings = re.findall(r"^### (\w+)$", page, flags=re.MULTILINE)
    assert sorted(headings) == sorted(ALERTS)


@pytest.mark.parametrize("board", dashboards.ALL, ids=lambda board: board.name)
def test_a_dashboard_is_whole(board: dashboards.Dashboard) -> None:
    made = json.loads(generate.files()[f"dashboards/accord-{board.name}.json"])
    panels = made["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        mine = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not mine & cells, f"{panel['title']} lies on another panel"
        cells |= mine
        if panel["type"] != "row":
            assert panel["targets"], panel["title"]


@dataclass(frozen=True)
class Case:
    """Series for `minutes`, and whether the alert fires at the end of them."""

    alert: str
    fires: bool
    series: dict[str, str]
    minutes: int = 90
    step: str = "1m"
    labels: dict[str, str] = field(default_factory=dict)


def _gauge(value: float, steps: int = 90) -> str:
    return f"{value:g}x{steps}"


def _count(per_step: float, steps: int = 90) -> str:
    """A counter that grows."""
    return f"0+{per_step:g}x{steps}"


OK = 'ray_accord_requests_total{method="GenerateImages", status="OK", WorkerId="a"}'
FAILED = 'ray_accord_errors_total{method="GenerateImages", reason="INTERNAL_ERROR", WorkerId="a"}'
THEIRS = 'ray_accord_errors_total{method="GenerateImages", reason="FIELD_INVALID", WorkerId="a"}'
FAST = 'ray_accord_request_seconds_bucket{method="GenerateImages", le="10.0"}'
ALL_CALLS = 'ray_accord_request_seconds_count{method="GenerateImages"}'
QUEUED = 'ray_accord_engine_samples_queued{WorkerId="a"}'
GOOD = 'accord_feedback_judgements_total{kind="served", verdict="good"}'
BAD = 'accord_feedback_judgements_total{kind="served", verdict="bad"}'
HEALTHY = 'ray_serve_deployment_replica_healthy{deployment="Gateway", replica="r1"}'
UP = 'up{job="feedback"}'
LOOKED = "accord_rollout_last_look_timestamp_seconds"  # promtool's clock begins at 0
VOLUME = 'kubelet_volume_stats_%s_bytes{namespace="accord", persistentvolumeclaim="accord-runs"}'
JOB = '{app_kubernetes_io_component="job", accord_dev_stage="finetune"}'
STEPS = 15 * 48  # of half an hour: a fortnight and a day


def _requests(failed: float, steps: int = 90) -> dict[str, str]:
    return {OK: _count(600, steps), FAILED: _count(600 * failed, steps)}


def _calls(slow: float, steps: int = 90) -> dict[str, str]:
    return {OK: _count(600, steps), ALL_CALLS: _count(600, steps), FAST: _count(600 * (1 - slow), steps)}


def _week(before: float, after: float, good_before: float, good_after: float) -> dict[str, str]:
    """10 images and 5 judgements each half hour for two weeks; the second week differs from the first."""
    half = STEPS // 2

    def turning(a: float, b: float) -> str:
        return f"0+{a:g}x{half} {a * half + b:g}+{b:g}x{half}"

    return {
        "ray_accord_reward_sum": turning(10 * before, 10 * after),
        "ray_accord_reward_count": _count(10, STEPS),
        GOOD: turning(5 * good_before, 5 * good_after),
        BAD: turning(5 * (1 - good_before), 5 * (1 - good_after)),
    }


LONG: dict[str, Any] = {"minutes": 30 * STEPS, "step": "30m"}
MIDDLE: dict[str, Any] = {"minutes": 500, "step": "5m"}
CASES = [
    Case("AccordAvailabilityFastBurn", True, _requests(0.02)),
    Case("AccordAvailabilityFastBurn", False, _requests(0.01)),
    Case("AccordAvailabilityFastBurn", False, {OK: _count(60), THEIRS: _count(30)}),
    Case("AccordAvailabilityFastBurn", False, {OK: _count(1), FAILED: _count(0.5)}),
    Case("AccordAvailabilityMiddleBurn", True, _requests(0.008, 100), **MIDDLE),
    Case("AccordAvailabilityMiddleBurn", False, _requests(0.004, 100), **MIDDLE),
    Case("AccordAvailabilitySlowBurn", True, _requests(0.0015, STEPS), **LONG),
    Case("AccordAvailabilitySlowBurn", False, _requests(0.0005, STEPS), **LONG),
    Case("AccordLatencyFastBurn", True, _calls(0.8)),
    Case("AccordLatencyFastBurn", False, _calls(0.5)),
    Case("AccordLatencyMiddleBurn", True, _calls(0.4, 100), **MIDDLE),
    Case("AccordLatencyMiddleBurn", False, _calls(0.2, 100), **MIDDLE),
    Case("AccordLatencySlowBurn", True, _calls(0.08, STEPS), **LONG),
    Case("AccordLatencySlowBurn", False, _calls(0.02, STEPS), **LONG),
    Case("AccordServingDown", True, {HEALTHY: _gauge(0)}, 10),
    Case("AccordServingDown", True, {"nothing": _gauge(1)}, 10, labels={"deployment": "Gateway"}),
    Case("AccordServingDown", False, {HEALTHY: _gauge(1)}, 10),
    Case("AccordFeedbackDown", True, {UP: _gauge(0)}, 10),
    Case("AccordFeedbackDown", True, {"nothing": _gauge(1)}, 10, labels={"job": "feedback"}),
    Case("AccordFeedbackDown", False, {UP: _gauge(1)}, 10),
    Case("AccordQueueGrowing", True, {QUEUED: "0+5x90"}, 60),
    Case("AccordQueueGrowing", False, {QUEUED: "200-1x90"}, 60),
    Case("AccordQueueGrowing", False, {QUEUED: "0+0.5x90"}, 60),
    Case("AccordQueueSlow", True, {'ray_accord_engine_queue_seconds{WorkerId="a"}': _gauge(8)}, 30),
    Case("AccordQueueSlow", False, {'ray_accord_engine_queue_seconds{WorkerId="a"}': _gauge(2)}, 30),
    Case(
        "AccordReplicasRestarting",
        True,
        {'ray_serve_deployment_replica_starts_total{deployment="Generation"}': _count(1)},
        labels={"deployment": "Generation"},
    ),
    Case(
        "AccordReplicasRestarting",
        False,
        {'ray_serve_deployment_replica_starts_total{deployment="Generation"}': _count(0.1)},
    ),
    Case("AccordModelLoadFailing", True, {"ray_accord_model_load_failures_total": _count(1)}, 20),
    Case("AccordModelLoadFailing", False, {"ray_accord_model_load_failures_total": _gauge(3)}, 20),
    Case(
        "AccordRewardDrift",
        True,
        {
            "ray_accord_reward_sum": f"0+100x{STEPS - 6} {100 * (STEPS - 6) + 150}+150x10",
            "ray_accord_reward_count": _count(200, STEPS),
        },
        **LONG,
    ),
    Case(
        "AccordRewardDrift",
        False,
        {"ray_accord_reward_sum": _count(100, STEPS), "ray_accord_reward_count": _count(200, STEPS)},
        **LONG,
    ),
    Case("AccordRewardHacked", True, _week(0.5, 0.6, 0.7, 0.65), 30 * (STEPS // 2 + 100), "30m"),
    Case("AccordRewardHacked", False, _week(0.5, 0.6, 0.7, 0.8), 30 * (STEPS // 2 + 100), "30m"),
    Case("AccordRewardHacked", False, _week(0.5, 0.5, 0.7, 0.65), 30 * (STEPS // 2 + 100), "30m"),
    Case("AccordGoodRateLow", True, _week(0.5, 0.5, 0.8, 0.4), 30 * (STEPS // 2 + 60), "30m"),
    Case("AccordGoodRateLow", False, _week(0.5, 0.5, 0.8, 0.75), 30 * (STEPS // 2 + 60), "30m"),
    Case(
        "AccordTasksStuck",
        True,
        {'accord_feedback_tasks_stuck{campaign="c"}': _gauge(2)},
        labels={"campaign": "c"},
    ),
    Case("AccordTasksStuck", False, {'accord_feedback_tasks_stuck{campaign="c"}': _gauge(0)}),
    Case("AccordChampionNotServed", True, {"accord_rollout_champion_disagrees": _gauge(1)}, 20),
    Case("AccordChampionNotServed", False, {"accord_rollout_champion_disagrees": _gauge(0)}, 20),
    Case("AccordRolloutBlind", True, {LOOKED: _gauge(0)}, 30),
    Case("AccordRolloutBlind", False, {LOOKED: "0+60x90"}, 30),
    Case(
        "AccordJobStuck",
        True,
        {f"ray_node_cpu_utilization{JOB}": _gauge(1), f"ray_node_gpus_utilization{JOB}": _gauge(0)},
        labels={"accord_dev_stage": "finetune"},
    ),
    Case(
        "AccordJobStuck",
        False,
        {f"ray_node_cpu_utilization{JOB}": _gauge(4), f"ray_node_gpus_utilization{JOB}": _gauge(90)},
    ),
    Case("AccordJobStuck", False, {f"ray_node_cpu_utilization{JOB}": _gauge(80)}),
    Case(
        "AccordJobWaiting",
        True,
        {'kuberay_job_deployment_status{name="loop", deployment_status="Initializing"}': _gauge(1, 200)},
        150,
        labels={"name": "loop"},
    ),
    Case(
        "AccordJobWaiting",
        False,
        {'kuberay_job_deployment_status{name="loop", deployment_status="Running"}': _gauge(1, 200)},
        150,
    ),
    Case(
        "AccordJobFailed",
        True,
        {'kuberay_job_deployment_status{name="loop", deployment_status="Failed"}': _gauge(1)},
        5,
        labels={"name": "loop"},
    ),
    Case(
        "AccordJobFailed",
        False,
        {'kuberay_job_deployment_status{name="loop", deployment_status="Complete"}': _gauge(1)},
        5,
    ),
    Case(
        "AccordGpuMemoryHigh",
        True,
        {
            'ray_node_gram_used{instance="n", GpuIndex="0"}': _gauge(79000),
            'ray_node_gram_available{instance="n", GpuIndex="0"}': _gauge(1000),
        },
        20,
        labels={"instance": "n", "GpuIndex": "0"},
    ),
    Case(
        "AccordGpuMemoryHigh",
        False,
        {
            'ray_node_gram_used{instance="n", GpuIndex="0"}': _gauge(60000),
            'ray_node_gram_available{instance="n", GpuIndex="0"}': _gauge(20000),
        },
        20,
    ),
    Case(
        "AccordVolumeFull",
        True,
        {VOLUME % "available": _gauge(4e9), VOLUME % "capacity": _gauge(1e11)},
        10,
        labels={"persistentvolumeclaim": "accord-runs"},
    ),
    Case(
        "AccordVolumeFull", False, {VOLUME % "available": _gauge(2e10), VOLUME % "capacity": _gauge(1e11)}, 10
    ),
    Case(
        "AccordVolumeFilling",
        True,
        {VOLUME % "available": "18000000000-5000000x200", VOLUME % "capacity": _gauge(1e11, 200)},
        150,
        labels={"persistentvolumeclaim": "accord-runs"},
    ),
    Case(
        "AccordVolumeFilling",
        False,
        {VOLUME % "available": _gauge(1.5e10, 200), VOLUME % "capacity": _gauge(1e11, 200)},
        150,
    ),
    Case(
        "AccordNodeDiskFull",
        True,
        {'ray_node_disk_utilization_percentage{instance="n"}': _gauge(95)},
        20,
        labels={"instance": "n"},
    ),
    Case("AccordNodeDiskFull", False, {'ray_node_disk_utilization_percentage{instance="n"}': _gauge(50)}, 20),
]


@pytest.mark.prometheus
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    """All cases in one run of `promtool test rules`, which says which of them is wrong."""
    files = [_promtool_file(tmp_path, number, case) for number, case in enumerate(CASES)]
    done = _promtool("test", "rules", *files)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def _promtool_file(folder: Path, number: int, case: Case) -> Path:
    """With the alert and what it is made of alone: the others' long windows cost minutes."""
    (folder / f"rules{number}.yaml").write_text(
        yaml.safe_dump({"groups": [{"name": "all", "rules": _needed(case.alert)}]}), encoding="utf-8"
    )
    labels = {"severity": ALERTS[case.alert]["labels"]["severity"], **case.labels}
    test = {
        "name": f"{case.alert} {'fires' if case.fires else 'is silent'}",
        "interval": case.step,
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "alert_rule_test": [
            {
                "eval_time": f"{case.minutes}m",
                "alertname": case.alert,
                "exp_alerts": [{"exp_labels": labels}] if case.fires else [],
            }
        ],
    }
    content = {"rule_files": [f"rules{number}.yaml"], "evaluation_interval": case.step, "tests": [test]}
    path = folder / f"test{number}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def _needed(alert: str) -> list[dict[str, Any]]:
    wanted = _names(ALERTS[alert]["expr"])
    made = [rule for rule in rules.recorded() if rule["record"] in wanted]
    # without its words, which promtool would have to be told letter by letter
    return [*made, {key: value for key, value in ALERTS[alert].items() if key != "annotations"}]


def test_every_alert_is_proven_both_ways() -> None:
    for alert in ALERTS:
        assert {case.fires for case in CASES if case.alert == alert} == {True, False}, alert
