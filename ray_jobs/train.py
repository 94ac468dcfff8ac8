"""The one place around Ray Train: runs a learner on 1..n workers, checkpoints it, and goes on where it was
stopped.

A learner (the fine-tuner, the reward learner) knows nothing of Ray. It draws the batch of step s from (seed,
s) and takes its rank's share, so the number of workers does not change what is computed, and there is no
cursor to restore.
"""

from __future__ import annotations

import fcntl
import json
import shutil
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
from ray_jobs import cluster
from ray_jobs.progress import Bar, bar, bars
from ray_jobs.snapshots import Snapshots

if TYPE_CHECKING:
    from accord.recipe import RayConfig

POLL_S = 0.25
CHECKPOINTS_KEPT = 2
SNAPSHOT = "checkpoint_manager_snapshot.json"


class Learner(Protocol):
    """What can be trained. `step` returns scalar tensors that stay on the device."""

    step_index: int

    def step(self) -> dict[str, Any]: ...

    def save(self, directory: Path) -> Any: ...

    def load(self, directory: Path) -> None: ...


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
        """Called when the trainings have ended: looks at what is left."""


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
            while any(run.is_alive() for run in group):
                for run in group:
                    run.join(POLL_S / len(group))
                    _show(run.directory, shown[runs.index(run)])
                if watch is not None:
                    watch.poll()
            for run in group:
                run.result()
    if watch is not None:
        watch.finish()
    return [run.result() for run in runs]


def _train_here(training: Training, directory: Path, config: RayConfig, watch: Watch | None) -> Path:
    """One training in this process, from its newest checkpoint; the path of the final one."""
    import torch

    use_cpu(config.threads_per_worker)
    build: Build = load_object(training.build)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    learner = build(rank=0, world_size=1, wrap=None, device=device, **training.arguments)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoints = sorted(path for path in directory.glob("step-*") if (path / "manifest.json").exists())
    if checkpoints:
        learner.load(checkpoints[-1])
    with (
        bar(training.title, training.steps, "steps") as progress,
        _tracker(asdict(training), directory) as run,
    ):
        ended = _stopped(training.snapshots)
        while learner.step_index < training.steps and not ended:
            metrics = learner.step()
            step = learner.step_index
            if training.snapshots is not None and watch is not None and training.snapshots.at(step):
                take_snapshot(learner, training.snapshots, rank=0)
                watch.poll()
                ended = _stopped(training.snapshots)
            last = ended or step == training.steps
            if step % training.log_every == 0 or last:
                values = _values(learner, metrics, last=last)
                progress.update(step, _loss_note(values.get("loss")))
                run.log(step, **values)
            if step % training.checkpoint_every == 0 or last:
                learner.save(directory / f"step-{step:08d}")
                for old in sorted(directory.glob("step-*"))[:-CHECKPOINTS_KEPT]:
                    shutil.rmtree(old)
    if watch is not None and training.snapshots is not None:
        watch.finish()
    return directory / f"step-{learner.step_index:08d}"


class _Run(threading.Thread):
    """One `fit`. Not in the main thread: there, Ray Train would take Ctrl-C for itself and end the process
    with 0.
    """

    def __init__(self, training: Training, directory: Path, config: RayConfig) -> None:
        super().__init__(daemon=True, name=f"train {training.name}")
        self.training, self.directory, self.config = training, directory, config
        self.outcome: Any = None
        _heal(directory)

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
        assert self.outcome.checkpoint is not None, f"{self.directory}: training ended without a checkpoint"
        return Path(self.outcome.checkpoint.path)


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
    }
    trainer = TorchTrainer(
        _worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=directory.name,
            storage_path=str(directory.parent),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
        ),
    )
    return trainer.fit()


def _worker(settings: dict[str, Any]) -> Any:  # Ray hands on what rank 0 returns
    """On each worker: build, restore, step. An AccordError in building is returned: a retry would meet it
    again.
    """
    import ray.train
    import ray.train.torch

    use_cpu(settings["threads"])
    training = settings["training"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    build: Build = load_object(training["build"])
    checkpoint = ray.train.get_checkpoint()
    try:
        learner = build(
            rank=rank,
            world_size=world_size,
            wrap=ray.train.torch.prepare_model if world_size > 1 else None,
            device=ray.train.torch.get_device(),
            **training["arguments"],
        )
        if checkpoint is not None:
            with checkpoint.as_directory() as directory:
                learner.load(Path(directory))
    except AccordError as error:
        return error
    with _tracker(training, Path(settings["directory"])) if rank == 0 else nullcontext() as run:
        _loop(learner, training, Path(settings["directory"]), rank, run)
    return None


def _loop(learner: Learner, training: dict[str, Any], directory: Path, rank: int, run: Any) -> None:
    import ray.train

    last = training["steps"]
    snapshots = Snapshots(**training["snapshots"]) if training["snapshots"] else None
    _note_progress(directory, learner.step_index, {}, rank)
    while learner.step_index < last:
        metrics = learner.step()
        step = learner.step_index
        if snapshots is not None and snapshots.at(step):
            take_snapshot(learner, snapshots, rank)
        looks = snapshots is not None and (step % training["log_every"] == 0 or snapshots.at(step))
        if snapshots is not None and looks and _all_stopped(snapshots, rank):
            last = step
        if rank == 0 and (step % training["log_every"] == 0 or step == last):
            values = _values(learner, metrics, last=step == last)
            _note_progress(directory, step, values, rank)
            if run is not None:
                run.log(step, **values)
        if step % training["checkpoint_every"] == 0 or step == last:
            checkpoint = _save(learner) if rank == 0 else None
            ray.train.report(
                {"step": step},
                checkpoint=checkpoint,
                checkpoint_dir_name=f"step-{step:08d}",
                delete_local_checkpoint_after_upload=True,
            )


def take_snapshot(learner: Any, snapshots: Snapshots, rank: int) -> None:
    """The averaged weights, for the guards. All workers call it; one writes."""
    if rank == 0:
        snapshots.take(learner.averaged_unet(), learner.step_index)


def _stopped(snapshots: Snapshots | None) -> bool:
    return snapshots is not None and snapshots.must_stop()


def _all_stopped(snapshots: Snapshots, rank: int) -> bool:
    """What rank 0 sees, so that all workers end at the same step."""
    import torch
    import torch.distributed as dist

    stopped = rank == 0 and snapshots.must_stop()
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return stopped
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    word = torch.tensor([int(stopped)], device=device)
    dist.broadcast(word, src=0)
    return bool(word.item())  # device-to-host sync, with those of the log


def _values(learner: Learner, metrics: Mapping[str, Any], *, last: bool) -> dict[str, float]:
    """What is logged of a step, at the last one with the learner's own validation."""
    values = {name: float(value) for name, value in metrics.items()}  # device-to-host sync, every log_every
    return values | learner.validate() if last and hasattr(learner, "validate") else values


def _save(learner: Learner) -> Any:
    import ray.train

    directory = Path(tempfile.mkdtemp(prefix="accord-checkpoint-")) / "checkpoint"
    learner.save(directory)
    return ray.train.Checkpoint.from_directory(str(directory))


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


def _heal(directory: Path) -> None:
    """Starts over when Ray Train was killed while it wrote its list of checkpoints (it does not write by
    rename).
    """
    snapshot = directory / SNAPSHOT
    if not snapshot.exists():
        return
    try:
        json.loads(snapshot.read_text())
    except ValueError:
        shutil.rmtree(directory)
