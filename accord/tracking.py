"""Runs in MLflow: parameters and metrics of a training, as one run however often it was interrupted."""

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accord.artifacts import canonical_json, write_file
from accord.config import redact_url
from accord.errors import StorageError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_logger = logging.getLogger(__name__)
_MAX_PARAMETER_CHARACTERS = 6000  # MLflow's own limit
_MAX_PARAMETERS_A_CALL = 100  # MLflow's own limit


class Run:
    """One MLflow run. Without a client (no tracking) it takes everything and does nothing."""

    def __init__(self, client: "MlflowClient | None" = None, run_id: str = "") -> None:
        self._client = client
        self.run_id = run_id

    def log(self, step: int, **metrics: Any) -> None:
        """Log numbers (or tensors of one number: moved to the host here) at a step. NaN is left out.

        A tracking server that does not answer never stops a training: it is warned of once.
        """
        if self._client is None:
            return
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        values = {name: float(value) for name, value in metrics.items()}  # device-to-host sync
        entities = [
            Metric(key=name, value=value, timestamp=now_ms, step=step)
            for name, value in values.items()
            if math.isfinite(value)
        ]
        try:
            self._client.log_batch(self.run_id, metrics=entities)
        except Exception as error:
            self._give_up(error)

    def _end(self, status: str) -> None:
        if self._client is None:
            return
        try:
            self._client.set_terminated(self.run_id, status)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        _logger.warning("tracking stops, the training goes on: %s", redact_url(str(error)))
        self._client = None


@contextlib.contextmanager
def track(
    tracking_uri: str,
    experiment: str,
    run_name: str,
    run_id_file: Path,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
) -> Iterator[Run]:
    """A run in `experiment`: the one whose id is in `run_id_file` goes on, else a new one begins.

    `params` may be nested ("optimiser.lr"). An empty `tracking_uri` tracks nothing.

    Raises:
        StorageError: when the tracking store cannot be opened.
    """
    if not tracking_uri:
        yield Run()
        return
    run = _open(tracking_uri, experiment, run_name, run_id_file, params, tags or {})
    try:
        yield run
    except Exception:
        run._end("FAILED")
        raise
    except BaseException:
        run._end("KILLED")
        raise
    run._end("FINISHED")


def attach(tracking_uri: str, run_id_file: Path | None) -> Run:
    """The run whose id is in `run_id_file`, to log to beside who began it; one that does nothing without."""
    if not tracking_uri or run_id_file is None or not run_id_file.exists():
        return Run()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    return Run(MlflowClient(tracking_uri=tracking_uri), run_id_file.read_text().strip())


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} as {"a.b": "1"}: MLflow's parameters are flat texts."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            text = value if isinstance(value, str) else canonical_json(value)
            flat[f"{prefix}{key}"] = text[:_MAX_PARAMETER_CHARACTERS]
    return flat


def _open(
    tracking_uri: str,
    experiment: str,
    run_name: str,
    run_id_file: Path,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
) -> Run:
    # A training must not ring home.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        if tracking_uri.startswith("sqlite:///"):
            Path(tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(tracking_uri=tracking_uri)
        run_id = _known_run(client, run_id_file)
        if run_id is None:
            run_id = _new_run(client, experiment, run_name, params, tags)
            write_file(run_id_file, run_id)
        else:
            client.update_run(run_id, status="RUNNING")
    except (MlflowException, OSError) as error:
        raise StorageError(
            f"cannot track in {redact_url(tracking_uri)!r}: {redact_url(str(error))}; "
            "set tracking.uri to another store, or to '' for none"
        ) from None
    return Run(client, run_id)


def _known_run(client: "MlflowClient", run_id_file: Path) -> str | None:
    from mlflow.exceptions import MlflowException

    if not run_id_file.exists():
        return None
    run_id = run_id_file.read_text().strip()
    try:
        client.get_run(run_id)
    except MlflowException:  # the store was removed or replaced: a new run begins
        return None
    return run_id


def _new_run(
    client: "MlflowClient", experiment: str, run_name: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> str:
    from mlflow.entities import Param

    found = client.get_experiment_by_name(experiment)
    experiment_id = found.experiment_id if found else client.create_experiment(experiment)
    run = client.create_run(experiment_id, run_name=run_name, tags=dict(tags))
    entities = [Param(key, value) for key, value in flatten(params).items()]
    for start in range(0, len(entities), _MAX_PARAMETERS_A_CALL):
        client.log_batch(run.info.run_id, params=entities[start : start + _MAX_PARAMETERS_A_CALL])
    return str(run.info.run_id)
