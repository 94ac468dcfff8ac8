"""Four Grafana dashboards, as Python: what a panel asks is one line, and every line is tested."""

from __future__ import annotations

from k8s.monitoring.grafana import Dashboard, Panel
from k8s.monitoring.rules import AVAILABILITY, LATENCY, LATENCY_S
from k8s.monitoring.training import TRAINING


def _rate(metric: str, by: str = "", window: str = "5m") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({metric}[{window}]))"


def _quantile(share: float, histogram: str, by: str = "") -> str:
    return f"histogram_quantile({share}, sum by (le{f', {by}' if by else ''}) (rate({histogram}_bucket[5m])))"


SERVING = Dashboard(
    "serving",
    "Accord: serving",
    [
        (
            "Objectives",
            [
                Panel(
                    "Failures",
                    [
                        ("accord:error_ratio:rate5m", "5 min"),
                        ("accord:error_ratio:rate1h", "1 h"),
                        ("accord:error_ratio:rate3d", "3 d"),
                    ],
                    "percentunit",
                    "Requests that ended with an error of ours",
                    1 - AVAILABILITY,
                ),
                Panel(
                    f"Slower than {LATENCY_S} s",
                    [("accord:slow_ratio:rate5m", "5 min"), ("accord:slow_ratio:rate1h", "1 h")],
                    "percentunit",
                    "Of GenerateImages",
                    1 - LATENCY,
                ),
                Panel(
                    "Healthy replicas",
                    [("sum by (deployment) (ray_serve_deployment_replica_healthy)", "{{deployment}}")],
                ),
            ],
        ),
        (
            "Requests",
            [
                Panel(
                    "Requests",
                    [(_rate("ray_accord_requests_total", "method, status"), "{{method}} {{status}}")],
                    "reqps",
                ),
                Panel(
                    "Errors by reason", [(_rate("ray_accord_errors_total", "reason"), "{{reason}}")], "reqps"
                ),
                Panel(
                    "Latency",
                    [
                        (_quantile(0.5, "ray_accord_request_seconds", "method"), "p50 {{method}}"),
                        (_quantile(0.95, "ray_accord_request_seconds", "method"), "p95 {{method}}"),
                    ],
                    "s",
                ),
                Panel("In flight", [("sum by (method) (ray_accord_requests_in_flight)", "{{method}}")]),
                Panel(
                    "Given up and timed out",
                    [
                        (_rate("ray_accord_cancelled_total"), "cancelled by the client"),
                        (_rate("ray_accord_expired_total"), "out of time"),
                    ],
                    "reqps",
                ),
                Panel(
                    "Calls begun again",
                    [(_rate("ray_accord_retries_total", "deployment, cause"), "{{deployment}} {{cause}}")],
                    "reqps",
                ),
            ],
        ),
        (
            "Engine",
            [
                Panel(
                    "Samples",
                    [
                        ("sum(ray_accord_engine_samples_in_flight)", "in flight"),
                        ("sum(ray_accord_engine_samples_queued)", "waiting"),
                    ],
                ),
                Panel(
                    "Waiting for the first step",
                    [("max(ray_accord_engine_queue_seconds)", "worst replica")],
                    "s",
                ),
                Panel(
                    "Batches used", [("avg(ray_accord_engine_batch_occupancy_ratio)", "mean")], "percentunit"
                ),
                Panel("A denoising call", [("avg(ray_accord_engine_step_seconds)", "mean")], "s"),
                Panel(
                    "Samples ended",
                    [
                        (_rate("ray_accord_engine_finished_total"), "finished"),
                        (_rate("ray_accord_engine_cancelled_total"), "cancelled"),
                        (_rate("ray_accord_engine_failed_total"), "failed"),
                        (_rate("ray_accord_engine_refused_total"), "refused"),
                    ],
                    "ops",
                ),
                Panel("Scoring a batch", [(_quantile(0.95, "ray_accord_score_batch_seconds"), "p95")], "s"),
            ],
        ),
        (
            "Machines",
            [
                Panel(
                    "Replicas wanted",
                    [("max by (deployment) (ray_serve_autoscaling_target_replicas)", "{{deployment}}")],
                ),
                Panel(
                    "GPU utilisation",
                    [
                        (
                            'ray_node_gpus_utilization{app_kubernetes_io_component="serving"}',
                            "{{instance}} {{GpuIndex}}",
                        )
                    ],
                    "percent",
                ),
                Panel(
                    "GPU memory",
                    [
                        (
                            "max by (instance, GpuIndex) (ray_node_gram_used"
                            " / (ray_node_gram_used + ray_node_gram_available))",
                            "{{instance}} {{GpuIndex}}",
                        )
                    ],
                    "percentunit",
                    bound=0.95,
                ),
            ],
        ),
    ],
)

FEEDBACK = Dashboard(
    "feedback",
    "Accord: feedback",
    [
        (
            "Campaigns",
            [
                Panel(
                    "Answers of those wanted",
                    [
                        (
                            "max by (campaign) (accord_feedback_answers)"
                            " / max by (campaign) (accord_feedback_answers_wanted)",
                            "{{campaign}}",
                        )
                    ],
                    "percentunit",
                ),
                Panel(
                    "Good among good and bad",
                    [("max by (campaign) (accord_feedback_good_ratio)", "{{campaign}}")],
                    "percentunit",
                ),
                Panel(
                    "Agreement (Krippendorff's alpha)",
                    [("max by (campaign) (accord_feedback_agreement_alpha)", "{{campaign}}")],
                ),
                Panel("Raters", [("max by (campaign) (accord_feedback_raters)", "{{campaign}}")]),
                Panel(
                    "Tasks out and stuck",
                    [
                        ("max by (campaign) (accord_feedback_leases_held)", "{{campaign}} with raters"),
                        ("max by (campaign) (accord_feedback_tasks_stuck)", "{{campaign}} stuck"),
                    ],
                ),
                Panel(
                    "Leases run out", [("max by (campaign) (accord_feedback_leases_expired)", "{{campaign}}")]
                ),
            ],
        ),
        (
            "Answers",
            [
                Panel(
                    "Judgements",
                    [(_rate("accord_feedback_judgements_total", "kind, verdict"), "{{kind}} {{verdict}}")],
                    "ops",
                ),
                Panel("Taken back", [(_rate("accord_feedback_undos_total"), "undone")], "ops"),
                Panel(
                    "Requests refused",
                    [(_rate("accord_feedback_refusals_total", "reason"), "{{reason}}")],
                    "ops",
                ),
            ],
        ),
        (
            "Service",
            [
                Panel(
                    "Time in the store",
                    [
                        (
                            _quantile(0.95, "accord_feedback_operation_seconds", "operation"),
                            "p95 {{operation}}",
                        )
                    ],
                    "s",
                ),
                Panel("Pods that answer", [('sum(up{job="feedback"})', "up")]),
            ],
        ),
    ],
)

MODELS = Dashboard(
    "models",
    "Accord: models",
    [
        (
            "The reward, and people",
            [
                Panel(
                    "Mean reward of images served",
                    [
                        ("accord:reward:mean1h", "1 h"),
                        ("accord:reward:mean1d", "1 d"),
                        ("accord:reward:mean7d", "7 d"),
                    ],
                ),
                Panel(
                    "Images that people found good",
                    [("accord:good_ratio:1d", "1 d"), ("accord:good_ratio:7d", "7 d")],
                    "percentunit",
                    "Of images that were served and rated",
                ),
                Panel(
                    "Both, against a week ago",
                    [
                        ("accord:reward:mean1d - accord:reward:mean1d offset 7d", "reward"),
                        ("accord:good_ratio:1d - accord:good_ratio:1d offset 7d", "good"),
                    ],
                    about="The first up and the second not: the reward is being pleased, not people",
                ),
            ],
        ),
        (
            "Rewards",
            [
                Panel(
                    "Spread of rewards",
                    [
                        (_quantile(0.1, "ray_accord_reward"), "p10"),
                        (_quantile(0.5, "ray_accord_reward"), "p50"),
                        (_quantile(0.9, "ray_accord_reward"), "p90"),
                    ],
                ),
                Panel(
                    "Candidates drawn for an image",
                    [
                        (_quantile(0.5, "ray_accord_candidates_per_image"), "p50"),
                        (_quantile(0.95, "ray_accord_candidates_per_image"), "p95"),
                    ],
                ),
                Panel("Verdicts on served images", [("accord:verdicts:increase1d", "1 d")]),
            ],
        ),
        (
            "Champion and canary",
            [
                Panel(
                    "Requests",
                    [
                        (
                            _rate("ray_accord_model_requests_total", "role, model"),
                            "{{role}} {{model}}",
                        )
                    ],
                    "reqps",
                ),
                Panel(
                    "Share that failed",
                    [
                        (
                            "sum by (role, model) "
                            '(rate(ray_accord_model_requests_total{outcome="error"}[5m]))'
                            " / sum by (role, model) (rate(ray_accord_model_requests_total[5m]))",
                            "{{role}} {{model}}",
                        )
                    ],
                    "percentunit",
                    "A canary's are drawn by the champion: no client sees them",
                ),
                Panel(
                    "Latency",
                    [
                        (
                            _quantile(0.95, "ray_accord_model_request_seconds", "role, model"),
                            "p95 {{role}} {{model}}",
                        )
                    ],
                    "s",
                ),
                Panel(
                    "Mean reward",
                    [
                        (
                            "sum by (role) (rate(ray_accord_reward_sum[30m]))"
                            " / sum by (role) (rate(ray_accord_reward_count[30m]))",
                            "{{role}}",
                        )
                    ],
                ),
                Panel(
                    "Served images sent to be rated",
                    [(_rate("ray_accord_recorded_images_total", "outcome"), "{{outcome}}")],
                    "ops",
                ),
                Panel(
                    "The rollout",
                    [
                        (
                            "time() - max(accord_rollout_last_look_timestamp_seconds)",
                            "seconds since it looked",
                        ),
                        ("max(accord_rollout_champion_disagrees)", "1: not the registry's champion serves"),
                    ],
                ),
            ],
        ),
        (
            "Output",
            [
                Panel(
                    "Images",
                    [
                        (_rate("ray_accord_images_total"), "returned"),
                        (_rate("ray_accord_candidates_total"), "drawn"),
                        (_rate("ray_accord_scored_images_total"), "scored"),
                    ],
                    "ops",
                ),
                Panel(
                    "Models that could not be loaded",
                    [("sum(increase(ray_accord_model_load_failures_total[1h]))", "1 h")],
                ),
            ],
        ),
    ],
)

ALL = (SERVING, TRAINING, FEEDBACK, MODELS)
