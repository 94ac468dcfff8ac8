"""What Prometheus is told of the rollout: that it looks, what it does, and whether the registry agrees."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class RolloutMetrics:
    """Of one process. `outcome` is looked or failed, `action` promote or take_out."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.looks = Counter(
            "accord_rollout_looks", "Times that it looked.", ("outcome",), registry=self.registry
        )
        self.moves = Counter("accord_rollout_moves", "What it did.", ("action",), registry=self.registry)
        self.last_look = Gauge(
            "accord_rollout_last_look_timestamp_seconds",
            "When all that it asks last answered (Unix time).",
            registry=self.registry,
        )
        self.disagrees = Gauge(
            "accord_rollout_champion_disagrees",
            "1 while another model serves as champion than the registry says.",
            registry=self.registry,
        )
        for outcome in ("looked", "failed"):  # a series that is there from the start can be seen to rise
            self.looks.labels(outcome)
        for action in ("promote", "take_out"):
            self.moves.labels(action)
