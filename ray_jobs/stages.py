"""The bookkeeping of stages: what is done, with which configuration, and how long it took.

A stage is done when its output directory holds a manifest, and that manifest is true to what the stage would
do now: the same kind, configuration, seed and input digests. A stage that is not done is (re)started;
everything that it had finished before it was interrupted is found again by the stage itself.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accord.artifacts import Manifest, artifact_writer, canonical_json, read_manifest, write_file
from accord.errors import ArtifactError, ConfigError
from accord.recipe import Recipe

HEARTBEAT_S = 5.0
LOCK = ".lock"


@contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Keeps every other process out of the run directory during the block. The lock ends with its process.

    Where the file system knows no locks, nobody is kept out. Raises ConfigError when another one works there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another command is at work in {run_dir}. Wait until it has ended, or name another --run-dir"
            ) from None
        except OSError:
            pass
        yield


@dataclass(frozen=True)
class Stage:
    """An artifact that is going to be made in the run directory, and from what.

    `config` holds every setting that changes the result and nothing else (not the number of workers, for
    example); `inputs` names the digest of every artifact that the stage reads. The note of an older version
    may have keys that change nothing (`free`), and lack younger ones, which then were as in `defaults`.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    seed: int
    inputs: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    free: frozenset[str] = frozenset()

    def description(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(canonical_json(dict(self.config)))
        return {"kind": self.kind, "config": plain, "seed": self.seed, "inputs": dict(self.inputs)}

    def noted(self, note: Mapping[str, Any]) -> dict[str, Any]:
        """The description in a note, as this version would have written it."""
        plain = json.loads(canonical_json(dict(self.defaults))) | note.get("config", {})
        return {**note, "config": {key: value for key, value in plain.items() if key not in self.free}}


def is_done(stage: Stage, run_dir: Path) -> bool:
    """Whether the stage's artifact is there; if not, its start is noted.

    Raises ConfigError when the directory holds this stage's work, finished or not, of another configuration.
    """
    output, note = run_dir / stage.name, run_dir / "stages" / f"{stage.name}.json"
    wanted = stage.description()
    if note.exists():
        refuse_changes(stage.name, stage.noted(_read_json(note)), wanted, run_dir)
    elif output.exists():
        raise ConfigError(
            f"{output} is there, but no stage of this run made it (there is no {note}). "
            "Choose another --run-dir, or move that directory away."
        )
    else:
        write_json(note, wanted)
    if not (output / "manifest.json").exists():
        return False
    manifest = read_manifest(output)
    if manifest.kind != stage.kind:
        raise ArtifactError(
            f"{output} is a {manifest.kind!r}; expected a {stage.kind!r}. Choose another --run-dir."
        )
    return True


@contextmanager
def stage_writer(stage: Stage, run_dir: Path) -> Iterator[Path]:
    """`artifact_writer` for the stage's output."""
    with artifact_writer(
        run_dir / stage.name, stage.kind, inputs=stage.inputs, config=stage.config, seed=stage.seed
    ) as directory:
        yield directory


def refuse_changes(name: str, found: Mapping[str, Any], wanted: Mapping[str, Any], run_dir: Path) -> None:
    """Raises ConfigError that names each key in which two descriptions of a stage differ."""
    before, now = flatten(found), flatten(wanted)
    missing = "(absent)"
    differing = [key for key in sorted({*before, *now}) if before.get(key, missing) != now.get(key, missing)]
    if not differing:
        return
    lines = [
        f"  {key}: {before.get(key, missing)!r} then, {now.get(key, missing)!r} now" for key in differing
    ]
    raise ConfigError(
        f"{run_dir} holds the stage {name!r} made with another configuration:\n"
        + "\n".join(lines)
        + "\nChoose another --run-dir, restore these settings, or start this stage over with --fresh."
    )


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; lists are leaves."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    if not value:
        return {prefix: {}} if prefix else {}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


OUTPUTS: dict[str, tuple[str, ...]] = {
    "collect": ("candidates",),
    "judge": ("snapshot",),
    "learn_reward": ("reward", "reward_no_auxiliary"),
    "score": ("scores",),
    "finetune": ("pretraining", "aligned", "control", "guards"),
    "evaluate": ("reference", "evaluation"),
    "report": (),
}
"""Every command in the order of the loop, and the artifacts that it makes in the run directory."""


def required(run_dir: Path, name: str) -> Manifest:
    """The manifest of an earlier stage's artifact; ArtifactError that says which command makes it."""
    directory = run_dir / name
    if not (directory / "manifest.json").exists():
        command = next(command for command, names in OUTPUTS.items() if name in names).replace("_", "-")
        raise ArtifactError(
            f"{directory} is not there yet. Run `accord {command}` (or `accord loop`) with the same "
            "recipe first."
        )
    return read_manifest(directory)


def start_over(run_dir: Path, command: str, recipe: Recipe) -> None:
    """Removes what this command and those after it made.

    Images stay: they are named by their content and never in the way. Votes stay too, unless simulated raters
    gave them to a store of this run alone.
    """
    commands = list(OUTPUTS)
    after = commands if command in ("loop", "demo") else commands[commands.index(command) :]
    for name in (name for later in after for name in OUTPUTS[later]):
        rounds = (run_dir / "train").glob(f"{name}-round-*")
        for path in (run_dir / name, run_dir / "work" / name, run_dir / "train" / name, *rounds):
            if path.is_symlink():  # what a study's arms share is not this arm's to remove
                path.unlink()
            elif path.exists():
                shutil.rmtree(path)
        (run_dir / "stages" / f"{name}.json").unlink(missing_ok=True)
    if "judge" in after and recipe.panel is not None and recipe.feedback.url is None:
        for path in run_dir.glob("feedback.db*"):
            path.unlink()
    for name in ("report.html", "summary.json"):  # they would describe what is no longer there
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / "served", ignore_errors=True)
    if run_dir.exists():
        write_json(
            run_dir / "seconds.json",
            {name: s for name, s in read_seconds(run_dir).items() if name not in after},
        )


def read_seconds(run_dir: Path) -> dict[str, float]:
    """The seconds that each stage took, over all its interruptions."""
    path = run_dir / "seconds.json"
    return {str(k): float(v) for k, v in _read_json(path).items()} if path.exists() else {}


@contextmanager
def timed(run_dir: Path, name: str) -> Iterator[None]:
    """Adds the time inside to seconds.json, every few seconds, so that even a killed run has been counted."""
    before_s = read_seconds(run_dir).get(name, 0.0)
    start_s = time.monotonic()
    stop = threading.Event()

    def note() -> None:
        seconds = read_seconds(run_dir) | {name: round(before_s + time.monotonic() - start_s, 2)}
        write_json(run_dir / "seconds.json", seconds)

    def heartbeat() -> None:
        while not stop.wait(HEARTBEAT_S):
            note()

    thread = threading.Thread(target=heartbeat, daemon=True, name=f"timer of {name}")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        note()


def write_json(path: Path, value: Any) -> None:
    """Writes JSON all or nothing."""
    write_file(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(value, dict), f"{path} does not hold a JSON object"
    return value
