"""What a training tells Prometheus is on the page that is scraped, and is what the dashboard asks for."""

from __future__ import annotations

import re
import time
import urllib.request

import pytest

from accord.recipe import RayConfig
from k8s.monitoring.training import TRAINING
from tests.services.deployment import eventually

RUN = "demo finetune"
TRAINED = {
    "name": "aligned",
    "steps": 10,
    "tracking": {"run_name": RUN},
    "arguments": {"config": {"batch_size": 16, "pretraining_batch_size": 48}},
}


@pytest.mark.cluster
def test_the_dashboards_series_are_on_the_page(ray_cluster: RayConfig) -> None:
    import ray

    from ray_jobs.metrics import TrainingMetrics

    told = TrainingMetrics(TRAINED)
    told.report(2, {"loss": 0.75, "weight_mean": 0.5})
    time.sleep(0.05)
    told.report(4, {"loss": 0.25, "weight_mean": 0.625, "validation_accuracy": 0.875})
    node = ray.nodes()[0]  # type: ignore[no-untyped-call]
    page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def series() -> dict[str, float]:
        with urllib.request.urlopen(page, timeout=30) as answer:
            lines = [line for line in answer.read().decode().splitlines() if f'run="{RUN}"' in line]
        found = {}
        for line in lines:
            name, value = line.split("{")[0], float(line.rsplit(" ", 1)[1])
            metric = re.search(r'metric="(\w+)"', line)
            found[f"{name} {metric[1]}" if metric else name] = value
        return found

    eventually(lambda: series().get("ray_accord_train_step") == 4, "the page has the training")
    found = series()
    assert found["ray_accord_train_steps"] == 10
    assert found["ray_accord_train_value loss"] == 0.25
    assert found["ray_accord_train_value weight_mean"] == 0.625
    assert found["ray_accord_train_value validation_accuracy"] == 0.875
    steps, images = (found[f"ray_accord_train_{one}_per_second"] for one in ("steps", "images"))
    assert 0 < steps < 2 / 0.05
    assert images == pytest.approx(64 * steps)
    asked = {name for query in TRAINING.queries for name in re.findall(r"ray_accord_train_\w+", query)}
    assert asked == {name.split(" ")[0] for name in found}
    for wanted in re.findall(r'train_value\{metric=~?"([^"]+)"\}', " ".join(TRAINING.queries)):
        assert any(re.fullmatch(wanted, name.partition(" ")[2]) for name in found), wanted


def test_only_images_of_a_term_that_counts_are_counted() -> None:
    from ray_jobs.metrics import images_a_step

    batches = {"batch_size": 16, "pretraining_batch_size": 48}
    assert images_a_step({"batch_size": 16}) == 16
    assert images_a_step({**batches, "beta": 1.0}) == 64
    assert images_a_step({**batches, "beta": 0.0}) == 16
    assert images_a_step({**batches, "beta": 1.0, "objective": "pretraining_only"}) == 48
