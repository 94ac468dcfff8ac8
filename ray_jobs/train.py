"""The one place around Ray Train: runs a learner on 1..n workers, checkpoints it, and goes on where it was
stopped.

A learner (the fine-tuner, the reward learner) knows nothing of Ray. It draws the batch of step s from (seed,
s) and takes its rank's share, so the number of workers does not change what is computed, and there is no
cursor to restore.
"""

from __future__ import annotations

import fcntl
import functools
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from accord.artifacts import write_file
from accord.config import load_object
from accord.cpu import use_cpu
from accord.errors import AccordError
from ray_jobs import checkpoints, cluster
from ray_jobs.checkpoints import BackgroundWriter, Learner
from ray_jobs.progress import Bar, bar, bars
from ray_jobs.snapshots import Snapshots

if TYPE_CHECKING:
    from accord.recipe import RayConfig

POLL_S = 0.25


Build = Callable[..., Learner]
"""build(rank, world_size, wrap, device, **arguments): makes the learner on a worker, from files that all
workers reach.
"""


@dataclass(frozen=True)
class Tracking:
    """Where the metrics of a training go (accord.tracking); an empty `uri` is nowhere."""

    uri: str = ""
    experiment: str = ""
    run_name: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """A training: `build` names a Build as "module:function", so that a worker can import it."""

    name: str
    build: str
    arguments: Mapping[str, Any]
    steps: int
    log_every: int
    checkpoint_every: int
    title: str
    tracking: Tracking = Tracking()
    snapshots: Snapshots | None = None
    """Left for a Watch, which may end the training before its last step."""


class Watch(Protocol):
    """What looks at a training's snapshots while it goes on (ray_jobs.guards)."""

    def poll(self) -> None:
        """Called several times a second; must not wait. Without Ray: after each snapshot, and may."""

    def finish(self) -> None:
        """Called when its trainings have ended: looks at what is left, and lets go of its resources."""


def train(
    trainings: Sequence[Training], storage: Path, config: RayConfig, watch: Watch | None = None
) -> list[Path]:
    """Trains each to its last step, from its newest checkpoint in `storage`/NAME; the paths of the final
    checkpoints.

    Side by side where the cluster has room for all, else one after the other. `storage` must be reachable
    from every node. Raises the AccordError of a worker as itself.
    """
    if config.local:
        return [
            _train_here(training, storage.resolve() / training.name, config, watch) for training in trainings
        ]
    cluster.ensure(config)
    with bars() as progress:
        runs = [_Run(training, storage.resolve() / training.name, config) for training in trainings]
        shown = [progress.add(run.training.title, run.training.steps, "steps") for run in runs]
        together = len(runs) > 1 and cluster.has_room(config, len(runs), generators=watch is not None)
        for group in [runs] if together else [[run] for run in runs]:
            for run in group:
                run.start()
            watching = watch if any(run.training.snapshots for run in group) else None
            while any(run.is_alive() for run in group):
                for run in group:
                    run.join(POLL_S / len(group))
                    _show(run.directory, shown[runs.index(run)])
                if watching is not None:
                    watching.poll()
            for run in group:
                run.result()
            if watching is not None:  # before the next group: what measures may hold what that waits for
                watching.finish()
    return [run.result() for run in runs]


def _train_here(training: Training, directory: Path, config: RayConfig, watch: Watch | None) -> Path:
    """One training in this process, from its newest checkpoint; the path of the final one."""
    import torch

    use_cpu(config.threads_per_worker)
    build: Build = load_object(training.build)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    learner = build(rank=0, world_size=1, wrap=None, device=device, **training.arguments)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoints.restore(learner, checkpoints.newest_first(directory))
    waits = checkpoints.can_wait(learner, device, config.background_checkpoints)
    with (
        bar(training.title, training.steps, "steps") as progress,
        _tracker(asdict(training), directory) as run,
        BackgroundWriter() as background,
    ):
        ended = _stopped(training.snapshots)
        while learner.step_index < training.steps and not ended:
            metrics = learner.step()
            step = learner.step_index
            last = step == training.steps
            if training.snapshots is not None and watch is not None and (training.snapshots.at(step) or last):
                training.snapshots.take(learner, step, last=last)
                watch.poll()
                last = ended = last or _stopped(training.snapshots)
            if step % training.log_every == 0 or last:
                values = _values(learner, metrics, last=last)
                progress.update(step, _loss_note(values.get("loss")))
                run.log(step, **values)
            if step % training.checkpoint_every == 0 or last:
                write = checkpoints.writer_of(learner, 0, copy=waits)
                assert write is not None
                store = functools.partial(_store, write, directory, step)
                background.write(store) if waits else store()
    if watch is not None and training.snapshots is not None:
        watch.finish()
    return checkpoints.path_of(directory, learner.step_index)


def _store(write: checkpoints.Write, directory: Path, step: int) -> None:
    write(checkpoints.path_of(directory, step))
    checkpoints.prune(directory)


class _Run(threading.Thread):
    """One `fit`. Not in the main thread: there, Ray Train would take Ctrl-C for itself and end the process
    with 0.
    """

    def __init__(self, training: Training, directory: Path, config: RayConfig) -> None:
        super().__init__(daemon=True, name=f"train {training.name}")
        self.training, self.directory, self.config = training, directory, config
        self.outcome: Any = None
        checkpoints.heal(directory)

    def run(self) -> None:
        try:
            self.outcome = _fit(self.training, self.directory, self.config)
        except BaseException as error:
            self.outcome = error

    def result(self) -> Path:
        """The final checkpoint. Raises what stopped the training."""
        if isinstance(self.outcome, BaseException):
            raise cluster.accord_error(self.outcome) or self.outcome
        if isinstance(self.outcome.return_value, AccordError):
            raise self.outcome.return_value
        path = checkpoints.path_of(self.directory, self.training.steps)
        if _stopped(self.training.snapshots):  # before its last step
            path = next(iter(checkpoints.newest_first(self.directory)), path)
        assert path.exists(), f"{self.directory}: training ended without a checkpoint"
        checkpoints.prune(self.directory)
        return path


def _fit(training: Training, directory: Path, config: RayConfig) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources: dict[str, float] = {"CPU": config.cpus_per_worker}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    settings = {
        "training": asdict(training),
        "directory": str(directory),
        "threads": config.threads_per_worker,
        "background": config.background_checkpoints,
    }
    workers: Any = config.num_workers
    if config.min_workers is not None and config.min_workers < config.num_workers:
        workers = (config.min_workers, config.num_workers)  # as many as the cluster has room for
    trainer = TorchTrainer(
        _worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=directory.name,
            storage_path=str(directory.parent),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=checkpoints.KEPT),
        ),
    )
    return trainer.fit()


def _worker(settings: dict[str, Any]) -> Any:  # Ray hands on what rank 0 returns
    """On each worker: build, restore, step. An AccordError in building is returned: a retry would meet it
    again.
    """
    import ray.train
    import ray.train.collective
    import ray.train.torch

    use_cpu(settings["threads"])
    training, directory = settings["training"], Path(settings["directory"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    build: Build = load_object(training["build"])
    # Not ray.train.get_checkpoint: that knows a checkpoint only when all workers have reported it. The first
    # worker chooses, so that all load the same.
    found = [str(path) for path in checkpoints.newest_first(directory)] if rank == 0 else None
    found = ray.train.collective.broadcast_from_rank_zero(found)
    device = ray.train.torch.get_device()
    try:
        learner = build(
            rank=rank,
            world_size=world_size,
            wrap=ray.train.torch.prepare_model if world_size > 1 else None,
            device=device,
            **training["arguments"],
        )
        checkpoints.restore(learner, [Path(path) for path in found or []])
    except AccordError as error:
        return error
    report = _Reporter(directory, rank, waits=checkpoints.can_wait(learner, device, settings["background"]))
    with _tracker(training, directory) if rank == 0 else nullcontext() as run:
        _loop(learner, training, report, run)
    return None


def _loop(learner: Learner, training: dict[str, Any], report: _Reporter, run: Any) -> None:
    from ray_jobs.metrics import TrainingMetrics

    last = training["steps"]
    exported = TrainingMetrics(training) if report.rank == 0 else None
    snapshots = Snapshots(**training["snapshots"]) if training["snapshots"] else None
    _note_progress(report.directory, learner.step_index, {}, report.rank)
    while learner.step_index < last:
        metrics = learner.step()
        step = learner.step_index
        is_logged = step % training["log_every"] == 0 or step == last
        if snapshots is not None:
            if snapshots.at(step) or step == last:
                snapshots.take(learner, step, last=step == last)
            if (is_logged or snapshots.at(step)) and snapshots.must_all_stop(report.rank):
                last, is_logged = step, True
        if report.rank == 0 and is_logged:
            values = _values(learner, metrics, last=step == last)
            _note_progress(report.directory, step, values, report.rank)
            if exported is not None:
                exported.report(step, values)
            if run is not None:
                run.log(step, **values)
        is_due = step % training["checkpoint_every"] == 0 or step == last
        if is_due or (is_logged and report.is_a_node_leaving()):
            report(learner)


class _Reporter:
    """Hands checkpoints to Ray Train, on all workers alike.

    `waits`: the first worker writes them in a thread while training goes on, one at a time. What fails there
    ends the training, as it would here; the checkpoint before it stays.
    """

    def __init__(self, directory: Path, rank: int, *, waits: bool) -> None:
        self.directory, self.rank, self.waits = directory, rank, waits
        self._free = threading.Semaphore(1)
        self._leaving: frozenset[str] = frozenset()

    def __call__(self, learner: Learner) -> None:
        import ray.train
        from ray.train import Checkpoint, CheckpointUploadMode

        path = checkpoints.path_of(self.directory, learner.step_index)
        self._free.acquire()
        write = checkpoints.writer_of(learner, self.rank, copy=self.waits)
        if write is None:
            self._free.release()

        def store(nothing: Checkpoint, name: str) -> Checkpoint:
            try:
                if write is not None:
                    write(path)
            finally:
                self._free.release()
            return Checkpoint.from_directory(str(path))

        ray.train.report(
            {"step": learner.step_index},
            # Ray would copy a finished directory, file by file. Ours appears at its place at once.
            checkpoint=None if write is None else Checkpoint.from_directory(tempfile.mkdtemp()),
            checkpoint_dir_name=path.name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC if self.waits else CheckpointUploadMode.SYNC,
            checkpoint_upload_fn=store,
            delete_local_checkpoint_after_upload=True,
        )

    def is_a_node_leaving(self) -> bool:
        """Whether a node of this training was called back (spot instances) since the last time; all workers
        must ask alike."""
        import ray.train

        news = ray.train.get_preemption_info()
        before, self._leaving = self._leaving, frozenset(news.preempted_node_ids if news else ())
        return bool(self._leaving - before)


def _stopped(snapshots: Snapshots | None) -> bool:
    return snapshots is not None and snapshots.must_stop()


def _values(learner: Learner, metrics: Mapping[str, Any], *, last: bool) -> dict[str, float]:
    """What is logged of a step, at the last one with the learner's own validation."""
    values = {name: float(value) for name, value in metrics.items()}  # device-to-host sync, every log_every
    return values | learner.validate() if last and hasattr(learner, "validate") else values


@contextmanager
def _tracker(training: dict[str, Any], directory: Path) -> Iterator[Any]:
    """The MLflow run of this training; one training at a time opens the store, since the first to come makes
    it.
    """
    from accord.tracking import track

    tracking = training["tracking"]
    with ExitStack() as stack:
        with (directory.parent / "tracking.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            run = stack.enter_context(
                track(
                    tracking["uri"],
                    tracking["experiment"],
                    tracking["run_name"],
                    directory / "mlflow_run_id",
                    tracking["params"],
                    tracking["tags"],
                )
            )
        yield run


def _note_progress(directory: Path, step: int, metrics: Mapping[str, float], rank: int) -> None:
    if rank == 0:
        content = {"step": step, "loss": metrics.get("loss")}
        write_file(directory / "progress.json", json.dumps(content), durable=False)


def _show(directory: Path, progress: Bar) -> None:
    try:
        content = json.loads((directory / "progress.json").read_text())
    except (OSError, ValueError):
        return
    progress.update(int(content["step"]), _loss_note(content.get("loss")))


def _loss_note(loss: float | None) -> str:
    return f"loss {loss:.4f}" if loss is not None else ""
