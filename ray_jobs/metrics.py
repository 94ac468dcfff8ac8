"""What Prometheus is told while a training runs: its step, what it logs, and how fast it is.

By ray.util.metrics, from rank 0, whenever the training logs. Names get the prefix ray_.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

STEP = "accord_train_step"
STEPS = "accord_train_steps"
VALUE = "accord_train_value"
STEP_RATE = "accord_train_steps_per_second"
IMAGE_RATE = "accord_train_images_per_second"


class TrainingMetrics:
    """Of one training; `run` is its name as MLflow has it, `metric` a logged name such as loss."""

    def __init__(self, training: Mapping[str, Any]) -> None:
        """`training` is a ray_jobs.train.Training as a dictionary."""
        name = str(training["tracking"]["run_name"] or training["name"])
        run = ("run",)
        self._step = Gauge(STEP, "Steps done.", tag_keys=run)
        self._steps = Gauge(STEPS, "Steps in all.", tag_keys=run)
        self._value = Gauge(VALUE, "A logged value: loss, and so on.", tag_keys=("run", "metric"))
        self._rate = Gauge(STEP_RATE, "Steps a second, since the last report.", tag_keys=run)
        self._images = Gauge(IMAGE_RATE, "Images learned from a second, over all workers.", tag_keys=run)
        self._tags = {"run": name}
        config = training["arguments"].get("config")
        self._batch = images_a_step(config) if isinstance(config, dict) else 0
        self._last: tuple[int, float] | None = None
        self._steps.set(training["steps"], tags=self._tags)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """What was logged of a step."""
        now = time.monotonic()
        if self._last is not None and now > self._last[1]:
            rate = (step - self._last[0]) / (now - self._last[1])
            self._rate.set(rate, tags=self._tags)
            if self._batch:
                self._images.set(rate * self._batch, tags=self._tags)
        self._last = (step, now)
        self._step.set(step, tags=self._tags)
        for name, value in values.items():
            self._value.set(value, tags={**self._tags, "metric": name})


def images_a_step(config: Mapping[str, Any]) -> int:
    """That a training with these settings learns from, over all workers: those of a term that counts."""
    generated = 0 if config.get("objective") == "pretraining_only" else int(config.get("batch_size") or 0)
    return generated + (int(config.get("pretraining_batch_size") or 0) if config.get("beta", 1) else 0)
