"""The Ray cluster of a run: started on this machine, or one that is already there."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from accord.config import redact_url
from accord.errors import AccordError, ConfigError

if TYPE_CHECKING:  # the recipe is light, Ray is not: it is imported when a stage has work to do
    from accord.recipe import RayConfig

# Read by libraries when they are imported. The first makes reports of training cost milliseconds instead of
# two seconds; the second waits for workers as long as a node may take to come, or a busy one to import torch
# (after 60 seconds Ray would begin anew); the others keep libraries from filling the terminal and from asking
# the network.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
# Of a cluster of our own. Ray has it so on macOS and Windows: all of its processes listen on the loopback
# interface alone. It is read when Ray is imported.
LOCAL_ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
T = TypeVar("T")
ADDRESS_VARIABLE = "ACCORD_RAY_ADDRESS"
START_ATTEMPTS = 3


def prepare_environment() -> None:
    """Sets what Ray reads when it is imported; what the user has set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def connect(address: str | None = None) -> Iterator[None]:
    """Chooses the cluster that `ensure` connects to; on leaving, disconnects if `ensure` has connected.

    `address` is that of a running cluster ("auto", "host:6379", "ray://..."), or None for one of our own on
    this machine. A loop whose stages are all done never starts Ray.
    """
    prepare_environment()
    before = os.environ.get(ADDRESS_VARIABLE)
    if address:
        os.environ[ADDRESS_VARIABLE] = address
    was_connected = is_connected()
    try:
        yield
    finally:
        if is_connected() and not was_connected:
            import ray

            ray.shutdown()
        if address:
            os.environ.pop(ADDRESS_VARIABLE)
            if before is not None:
                os.environ[ADDRESS_VARIABLE] = before


def is_connected() -> bool:
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def ensure(config: RayConfig) -> None:
    """Connects to the chosen cluster, once. Raises ConfigError when there is none at that address."""
    prepare_environment()
    address = os.environ.get(ADDRESS_VARIABLE)
    if not address and "ray" not in sys.modules:
        for name, value in LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    import ray
    from ray.data import DataContext

    if not ray.is_initialized():
        if not address:  # Ray's C++ parts write warnings for Ray's developers to the terminal
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        try:
            if address:
                _init(address)
            else:
                _start_here(config)
        except ConnectionError as error:
            raise ConfigError(
                f"no Ray cluster answers at {redact_url(str(address))!r}: {error}. "
                "Start one with `ray start --head`, or leave --address away to use this machine."
            ) from error
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    DataContext.get_current().print_on_execution_start = False


def _start_here(config: RayConfig) -> None:
    """Ray gives its parts 30 seconds to start, which a busy machine may exceed: they get several chances."""
    import ray

    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            _init("local", num_cpus=config.num_cpus, include_dashboard=False)
        except (ConnectionError, ValueError):  # no matter of time
            raise
        except Exception:  # Ray raises bare ones
            if attempt == START_ATTEMPTS:
                raise
            ray.shutdown()
        else:
            return


def _init(address: str, **options: Any) -> None:
    import ray

    # Ray would end the process with status 15 at a SIGTERM; what the command has made of it stays.
    before = signal.getsignal(signal.SIGTERM)
    with _quiet_stderr():
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def has_room(config: RayConfig, trainings: int, generators: int = 0) -> bool:
    """Whether that many trainings fit on the cluster at once, with that many actors that generate images."""
    import ray

    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus = max(config.cpus_per_worker, config.threads_per_worker) * config.num_workers
    gpus = config.gpus_per_worker * config.num_workers
    cpus_wanted = trainings * cpus + generators * config.cpus_per_generator
    gpus_wanted = trainings * gpus + generators * config.gpus_per_generator
    return cpus_wanted <= there.get("CPU", 0) and gpus_wanted <= there.get("GPU", 0)


def on_device(config: RayConfig, function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)` where a training worker would run: here without GPUs, else as a task that gets
    one.

    For work of seconds to minutes between the stages, such as encoding images; what it makes, it writes to
    files.
    """
    if config.gpus_per_worker == 0:
        return function(*arguments)
    ensure(config)
    import ray

    task = ray.remote(num_cpus=config.cpus_per_worker, num_gpus=1)(function)
    result: T = ray.get(task.remote(*arguments))
    return result


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hides what Ray's C++ parts print while they start; errors still arrive as exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def accord_error(error: BaseException) -> AccordError | None:
    """The AccordError inside an error that crossed Ray (RayTaskError, WorkerGroupError, ...), if there is
    one.
    """
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        current = waiting.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        # RayTaskError makes classes that inherit from the cause as well: the cause itself has the clean
        # message
        cause = getattr(current, "cause", None)
        if isinstance(current, AccordError) and not isinstance(cause, BaseException):
            return current
        if (full := _memory_full(current)) is not None:
            return full
        failures = getattr(current, "worker_failures", None) or {}
        waiting += [cause, *failures.values(), getattr(current, "controller_failure", None)]
        waiting.append(current.__cause__)  # not __context__: a bug in handling an AccordError is a bug
    return None


def _memory_full(error: BaseException) -> AccordError | None:
    """What to do, when it says that memory was full: the machine's, where Ray ends workers, or a GPU's."""
    kind = type(error).__name__
    go_on = "and the same command goes on; `accord doctor RECIPE` says what the run needs"
    if isinstance(error, RuntimeError) and kind == "OutOfMemoryError":  # torch's
        return AccordError(
            "a GPU's memory was full. Raise finetune.gradient_accumulation, or set "
            f"finetune.gradient_checkpointing or finetune.sharding, {go_on}. Smaller batches, or "
            "parameters: lora, need --fresh"
        )
    if kind == "OutOfMemoryError" and type(error).__module__.startswith("ray."):
        used = re.search(r"was (\S+) used / (\S+) limit", str(error))
        there = f" ({used[1]} of {used[2]} were used)" if used else ""
        return AccordError(
            f"the machine's memory was full{there}, and Ray ended a worker. Close what else runs, or lower "
            f"ray.num_workers or ray.generators, {go_on}"
        )
    return None


def is_job_address(address: str | None) -> bool:
    """Whether the address is that of a cluster's Jobs API, not one that a driver can join."""
    return bool(address) and str(address).startswith(("http://", "https://"))
