"""Prometheus rules: what is recorded, and what wakes somebody. docs/runbook.md has an entry for each alert.

Ray's metrics have a label for each process (WorkerId): nothing is used without a sum, max or avg over it.
"""

from __future__ import annotations

from typing import Any

Rule = dict[str, Any]
RUNBOOK = "docs/runbook.md"
BURN_WINDOWS = ("5m", "30m", "1h", "6h", "3d")

# Errors that are ours to mend. What clients do (a bad token, a bad field, more than their rate, too short a
# time, a call given up) is no failure of the service.
OUR_REASONS = "NOT_READY|BACKEND_UNAVAILABLE|INTERNAL_ERROR|REQUEST_TIMEOUT|CAPACITY_EXHAUSTED"
AVAILABILITY = 0.999
LATENCY = 0.95
LATENCY_S = 10
"""LATENCY of GenerateImages calls end within LATENCY_S seconds; it must be a bound of the histogram."""


def groups() -> list[dict[str, Any]]:
    """Rule groups in Prometheus' own form."""
    return [
        {"name": "accord-recorded", "interval": "30s", "rules": recorded()},
        {"name": "accord-slo", "rules": slo_alerts()},
        {"name": "accord-serving", "rules": serving_alerts()},
        {"name": "accord-models", "rules": model_alerts()},
        {"name": "accord-jobs", "rules": job_alerts()},
        {"name": "accord-machines", "rules": machine_alerts()},
    ]


def recorded() -> list[Rule]:
    """Ratios over the windows that alerts and dashboards ask for."""
    rules: list[Rule] = []
    for window in BURN_WINDOWS:
        requests = f"sum(rate(ray_accord_requests_total[{window}]))"
        errors = f'sum(rate(ray_accord_errors_total{{reason=~"{OUR_REASONS}"}}[{window}]))'
        rules.append(_record(f"accord:error_ratio:rate{window}", f"({errors} or vector(0)) / {requests}"))
        calls = '{method="GenerateImages"}'
        fast = f'{{method="GenerateImages", le=~"{LATENCY_S}([.]0)?"}}'
        rules.append(
            _record(
                f"accord:slow_ratio:rate{window}",
                f"1 - sum(rate(ray_accord_request_seconds_bucket{fast}[{window}]))"
                f" / sum(rate(ray_accord_request_seconds_count{calls}[{window}]))",
            )
        )
    rules.append(_record("accord:requests:increase1h", "sum(increase(ray_accord_requests_total[1h]))"))
    for window in ("1h", "1d", "7d"):
        rules.append(
            _record(
                f"accord:reward:mean{window}",
                f"sum(increase(ray_accord_reward_sum[{window}]))"
                f" / sum(increase(ray_accord_reward_count[{window}]))",
            )
        )
    rules.append(_record("accord:images:increase1h", "sum(increase(ray_accord_reward_count[1h]))"))
    judged = 'accord_feedback_judgements_total{{kind="served", verdict=~"{verdict}"}}'
    for window in ("1d", "7d"):
        good = f"sum(increase({judged.format(verdict='good')}[{window}]))"
        both = f"sum(increase({judged.format(verdict='good|bad')}[{window}]))"
        rules.append(_record(f"accord:good_ratio:{window}", f"{good} / {both}"))
    rules.append(_record("accord:verdicts:increase1d", both.replace("7d", "1d")))
    return rules


def slo_alerts() -> list[Rule]:
    """Multi-window, multi-burn-rate: how fast the month's budget of failures is being spent.

    A fast burn spends 2 % of the budget in an hour (14.4 times the allowed rate), a middle one 5 % in six
    hours (6 times); both wake somebody. A slow one (once, over three days) makes a ticket. The short window
    ends the alert soon after the trouble has ended. With fewer than 100 requests an hour, single failures
    would look like a fire.
    """
    rules: list[Rule] = []
    burns = (
        ("Fast", 14.4, "1h", "5m", "page", "2m"),
        ("Middle", 6.0, "6h", "30m", "page", "5m"),
        ("Slow", 1.0, "3d", "6h", "ticket", "30m"),
    )
    slos = (
        ("Availability", "accord:error_ratio", 1 - AVAILABILITY, "requests fail"),
        ("Latency", "accord:slow_ratio", 1 - LATENCY, f"GenerateImages calls take over {LATENCY_S} s"),
    )
    for slo, ratio, budget, what in slos:
        for burn, factor, long, short, severity, lasting in burns:
            bound = f"{factor * budget:.6g}"
            rules.append(
                _alert(
                    f"Accord{slo}{burn}Burn",
                    f"{ratio}:rate{long} > {bound} and {ratio}:rate{short} > {bound}"
                    " and accord:requests:increase1h > 100",
                    lasting,
                    severity,
                    f"{{{{ $value | humanizePercentage }}}} of {what} (over {long}): "
                    f"{factor:g} times what the objective allows",
                )
            )
    return rules


def serving_alerts() -> list[Rule]:
    """The service is away, or more comes in than goes out."""
    healthy = 'ray_serve_deployment_replica_healthy{deployment="Gateway"}'
    return [
        _alert(
            "AccordServingDown",
            f"sum({healthy}) < 1 or absent({healthy})",
            "2m",
            "page",
            "No gateway replica is healthy: nobody gets an image",
        ),
        _alert(
            "AccordFeedbackDown",
            'sum(up{job="feedback"}) < 1 or absent(up{job="feedback"})',
            "5m",
            "page",
            "The feedback service does not answer: raters cannot rate",
        ),
        _alert(
            "AccordQueueGrowing",
            "sum(ray_accord_engine_samples_queued) > 64"
            " and deriv(sum(ray_accord_engine_samples_queued)[10m:30s]) > 0",
            "10m",
            "page",
            "{{ $value }} samples wait, and there are more of them every minute",
        ),
        _alert(
            "AccordQueueSlow",
            "max(ray_accord_engine_queue_seconds) > 5",
            "10m",
            "ticket",
            "Samples wait {{ $value | humanizeDuration }} before their first step",
        ),
        _alert(
            "AccordReplicasRestarting",
            "sum by (deployment) (increase(ray_serve_deployment_replica_starts_total[1h])) > 20",
            "15m",
            "ticket",
            "{{ $labels.deployment }} began {{ $value | humanize }} replicas in an hour",
        ),
        _alert(
            "AccordModelLoadFailing",
            "sum(increase(ray_accord_model_load_failures_total[15m])) > 0",
            "1m",
            "page",
            "A model that was named cannot be loaded; the one before it goes on",
        ),
    ]


def model_alerts() -> list[Rule]:
    """What the models do, as their reward sees it and as people do."""
    return [
        _alert(
            "AccordRewardDrift",
            "abs(accord:reward:mean1h - accord:reward:mean7d) > 0.1 and accord:images:increase1h > 200",
            "1h",
            "ticket",
            "The mean reward of this hour's images is {{ printf \"%.2f\" $value }} away from the week's",
        ),
        _alert(
            "AccordRewardHacked",
            "(accord:reward:mean1d - accord:reward:mean1d offset 7d) > 0.05"
            " and (accord:good_ratio:1d - accord:good_ratio:1d offset 7d) <= 0"
            " and accord:verdicts:increase1d > 50",
            "6h",
            "page",
            'The reward rose by {{ printf "%.2f" $value }} in a week, and people like the images no better',
        ),
        _alert(
            "AccordGoodRateLow",
            "accord:good_ratio:1d < accord:good_ratio:7d - 0.1 and accord:verdicts:increase1d > 50",
            "2h",
            "page",
            "People find {{ $value | humanizePercentage }} of today's images good, 10 points below the week",
        ),
        _alert(
            "AccordTasksStuck",
            "max by (campaign) (accord_feedback_tasks_stuck) > 0",
            "1h",
            "ticket",
            "{{ $value }} tasks of {{ $labels.campaign }} were leased again and again without an answer",
        ),
        _alert(
            "AccordChampionNotServed",
            "max(accord_rollout_champion_disagrees) > 0",
            "10m",
            "page",
            "Another model serves than the registry's champion",
        ),
        _alert(
            "AccordRolloutBlind",
            "time() - max(accord_rollout_last_look_timestamp_seconds) > 900",
            "5m",
            "ticket",
            "The rollout has not seen its canary for {{ $value | humanizeDuration }}",
        ),
    ]


def job_alerts() -> list[Rule]:
    """A job that holds nodes and gets nowhere."""
    idle = (
        'max by (accord_dev_stage) (ray_node_cpu_utilization{app_kubernetes_io_component="job"}) < 10'
        " unless max by (accord_dev_stage)"
        ' (ray_node_gpus_utilization{app_kubernetes_io_component="job"}) > 5'
    )
    return [
        _alert(
            "AccordJobStuck",
            idle,
            "45m",
            "ticket",
            "The job {{ $labels.accord_dev_stage }} holds its nodes, and none of them works",
        ),
        _alert(
            "AccordJobWaiting",
            'max by (name) (kuberay_job_deployment_status{deployment_status=~"Initializing|Suspended"}) > 0',
            "2h",
            "ticket",
            "The job {{ $labels.name }} has had no nodes for two hours",
        ),
        _alert(
            "AccordJobFailed",
            'max by (name) (kuberay_job_deployment_status{deployment_status="Failed"}) > 0',
            "1m",
            "ticket",
            "The job {{ $labels.name }} failed, after its retries",
        ),
    ]


def machine_alerts() -> list[Rule]:
    """Memory and disks."""
    free = 'kubelet_volume_stats_available_bytes{namespace="accord"}'
    size = 'kubelet_volume_stats_capacity_bytes{namespace="accord"}'
    return [
        _alert(
            "AccordGpuMemoryHigh",
            "max by (ray_io_cluster, instance, GpuIndex) (ray_node_gram_used"
            " / (ray_node_gram_used + ray_node_gram_available)) > 0.95",
            "10m",
            "ticket",
            "GPU {{ $labels.GpuIndex }} of {{ $labels.instance }} has "
            "{{ $value | humanizePercentage }} of its memory in use",
        ),
        _alert(
            "AccordVolumeFull",
            f"min by (persistentvolumeclaim) ({free} / {size}) < 0.05",
            "5m",
            "page",
            "{{ $labels.persistentvolumeclaim }} has {{ $value | humanizePercentage }} left",
        ),
        _alert(
            "AccordVolumeFilling",
            f"min by (persistentvolumeclaim) ({free} / {size}) < 0.2"
            f" and min by (persistentvolumeclaim) (predict_linear({free}[6h], 4 * 86400)) < 0",
            "1h",
            "ticket",
            "{{ $labels.persistentvolumeclaim }} will be full within four days",
        ),
        _alert(
            "AccordNodeDiskFull",
            "max by (instance) (ray_node_disk_utilization_percentage) > 90",
            "10m",
            "ticket",
            "The disk of {{ $labels.instance }} is {{ $value | humanize }} % full",
        ),
    ]


def _record(name: str, expression: str) -> Rule:
    return {"record": name, "expr": expression}


def _alert(name: str, expression: str, lasting: str, severity: str, summary: str) -> Rule:
    return {
        "alert": name,
        "expr": expression,
        "for": lasting,
        "labels": {"severity": severity},
        "annotations": {"summary": summary, "runbook": f"{RUNBOOK}#{name.lower()}"},
    }
