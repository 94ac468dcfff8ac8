"""Watch a fine-tuning for reward hacking while it goes on: measure its snapshots beside it, and end it.

The rule is accord.guards.rule; here is the plumbing. The training leaves snapshots (ray_jobs.snapshots) and
goes on; the driver gives them, one after another, to an actor that measures them, or measures them itself
where there is no Ray. In RUN/guards:

    measurements.jsonl  one line a snapshot, from step 0 (the base model) on
    verdict.json        what the rule says of them
    pictures/           the first prompts' images at each snapshot
    held_out/           the held-out reward, if it was learned from judgements
    best/               the weights that the held-out judge liked best so far
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from accord.artifacts import load_tensors, read_manifest, write_file
from accord.errors import AccordError, FeedbackError
from accord.guards.measures import Judge, make_judge
from accord.guards.rule import HELD_OUT, REWARD, Decision, Measured, decide
from accord.guards.settings import JUDGEMENTS, GuardsConfig
from accord.images import Pixels, encode_png
from accord.prompts import PromptPlan, load_grammar
from accord.recipe import RayConfig, Recipe
from accord.tracking import attach
from ray_jobs import cluster, inputs, learn_reward
from ray_jobs.progress import say
from ray_jobs.score import rewards_of
from ray_jobs.snapshots import Snapshots, ask_to_stop, pending, unet_of
from ray_jobs.stages import write_json

if TYPE_CHECKING:  # takes seconds to import
    pass

DIRECTORY = "guards"
MEASUREMENTS, VERDICT = "measurements.jsonl", "verdict.json"
LEAST_JUDGED = 20
"""Fewer judged images than this teach a held-out reward nothing."""
_PICTURED_PROMPTS = 8
_ATTEMPTS = 3


class Guards:
    """The guards of one run: a Watch of ray_jobs.train."""

    def __init__(self, recipe: Recipe, run_dir: Path, config: GuardsConfig) -> None:
        self.recipe, self.run_dir, self.config = recipe, run_dir, config
        self.directory = run_dir / DIRECTORY
        self.directory.mkdir(parents=True, exist_ok=True)
        self.rows = load_measurements(run_dir)
        self._run_id_file: Path | None = None
        self._meter: Any = None
        self._busy: tuple[Any, int] | None = None
        self._failures = 0
        self._is_tight = False  # whether the cluster cannot hold a training and what measures it at once
        self._tracked = len(self.rows)
        if config.held_out == JUDGEMENTS and not (self.directory / "held_out" / "manifest.json").exists():
            cluster.on_device(recipe.ray, learn_held_out, recipe, run_dir)
        if self.has_stopped():  # killed before it could ask
            ask_to_stop(self.directory, self.decision().reason)

    def snapshots(self, training: str, offset: int, model: str) -> Snapshots:
        """Where the training of that name, of the model in that directory, leaves its snapshots, `offset`
        steps after the first round's start."""
        self._run_id_file = self.run_dir / "train" / training / "mlflow_run_id"
        config = self.recipe.finetune.model_dump(mode="json", exclude={"guards"})
        return Snapshots(str(self.directory), self.config.every, offset, model, config)

    def decision(self) -> Decision:
        """What the rule says of all that was measured."""
        return decide(self.rows, self.config)

    def has_stopped(self) -> bool:
        """Whether training must not go on."""
        return self.config.action == "stop" and self.decision().tripped

    def best(self) -> Path | None:
        """The best snapshot; None if it is the base model."""
        step = self.decision().best_step
        return self._best(step) if step else None

    def poll(self) -> None:
        """Takes a measurement that is done, and starts the next. Without Ray it measures all that waits."""
        if self.recipe.ray.local:
            while (work := self._next()) is not None:
                self._meter = self._meter or Meter(self.recipe, self.run_dir, None)
                self._note(work[0], self._meter.measure(*work))
            return
        if self._busy is not None and not self._collect(wait=False):
            return
        # Not before the training has left something: it has its resources then, and cannot lose them to us.
        if self._meter is not None or pending(self.directory):
            self._begin()
        if self._busy is None and self._is_tight:
            self._release()  # a training that lost a worker may wait for what we hold

    def finish(self) -> None:
        """Measures what is left, and lets go of the device."""
        self.poll()
        while not self.recipe.ray.local:
            if self._busy is not None:
                self._collect(wait=True)
            self._begin()
            if self._busy is None:
                break
        self._release()

    def _begin(self) -> None:
        """Starts the next measurement, if any is left."""
        if (work := self._next()) is None:
            return
        if self._meter is None:
            if not self._is_tight:
                self._is_tight = not _has_room(self.recipe.ray)
            self._meter = _start_meter(self.recipe, self.run_dir)
        self._busy = self._meter.measure.remote(*work), work[0]

    def _release(self) -> None:
        if self._meter is not None and not self.recipe.ray.local:
            import ray

            ray.kill(self._meter)
        self._meter = None

    def _collect(self, *, wait: bool) -> bool:
        """Whether the measurement under way is over; its row is then noted."""
        import ray

        assert self._busy is not None
        reference, step = self._busy
        if not ray.wait([reference], timeout=None if wait else 0)[0]:
            return False
        self._busy = None
        try:
            row = ray.get(reference)
        except ray.exceptions.RayActorError as error:  # its node went, or the memory: it is measured anew
            self._failures += 1
            if self._failures >= _ATTEMPTS:
                raise AccordError(
                    f"guards: what measures the snapshots died {_ATTEMPTS} times: {error}"
                ) from error
            self._meter = None
            return True
        self._note(step, row)
        return True

    def _next(self) -> tuple[int, str | None] | None:
        """The next snapshot to measure: first the base model. One that was measured already is settled."""
        known = {row.step for row in self.rows}
        if 0 not in known:
            return 0, None
        for step, path in pending(self.directory):
            if step in known or self.has_stopped():
                self._settle(step)
            else:
                return step, str(path)
        return None

    def _note(self, step: int, row: Mapping[str, Any]) -> None:
        before = self.decision().tripped
        self.rows.append(Measured.from_row(row))
        # Whole: after a line that a crash has cut, one more would be lost with it.
        lines = [json.dumps(known.as_row()) + "\n" for known in self.rows]
        write_file(self.directory / MEASUREMENTS, "".join(lines))
        decision = self.decision()
        write_json(self.directory / VERDICT, {**decision.as_dict(), "action": self.config.action})
        self._settle(step)
        self._track()
        if decision.tripped and not before:
            does = "fine-tuning stops" if self.config.action == "stop" else "fine-tuning goes on"
            say(
                f"Guards: {decision.reason}. So {does}; the best checkpoint so far, of step "
                f"{decision.best_step}, is kept."
            )
            if self.config.action == "stop":
                ask_to_stop(self.directory, decision.reason)

    def _track(self) -> None:
        """Logs what is not logged yet: the first measurement may be done before the training has a run."""
        run = attach(self.recipe.tracking_uri(self.run_dir), self._run_id_file)
        if run.run_id:
            for row in self.rows[self._tracked :]:
                run.log(row.step, **{f"guard/{name}": row.mean(name) for name in row.by_prompt})
            self._tracked = len(self.rows)

    def _settle(self, step: int) -> None:
        """Keeps a measured snapshot if it is the best, and removes it if it is not."""
        snapshot = self.directory / "pending" / f"step-{step:08d}"
        if not snapshot.exists():
            return
        if step != self.decision().best_step:
            shutil.rmtree(snapshot)
            return
        best = self._best(step)
        best.parent.mkdir(exist_ok=True)
        shutil.rmtree(best, ignore_errors=True)
        snapshot.rename(best)
        for old in best.parent.iterdir():
            if old != best:
                shutil.rmtree(old)

    def _best(self, step: int) -> Path:
        return self.directory / "best" / f"step-{step:08d}"


class Meter:
    """Measures snapshots of the recipe's base model; in an actor, or in this process."""

    def __init__(self, recipe: Recipe, run_dir: Path, threads: int | None) -> None:
        import torch

        from accord.diffusion.model import load_diffusion_model
        from accord.guards.probe import Probe
        from accord.reward.features import TextCache
        from accord.reward.model import RewardModel

        if threads is not None:
            torch.set_num_threads(threads)
        config = recipe.finetune.guards
        assert config is not None
        _, encoder = learn_reward.feature_cache(recipe, run_dir)
        features, texts = _LastFeatures(encoder), TextCache(encoder)

        def reward_of(directory: Path) -> Judge:
            model = RewardModel.load(directory, clip=encoder)
            return lambda images, prompts: model.score_features(
                features(images, prompts), texts.text_features(prompts)
            )

        grammar = load_grammar(recipe.grammar)
        plan = PromptPlan(per_category=config.prompts)
        self.directory, self.per_prompt = run_dir / DIRECTORY, config.images_per_prompt
        self.probe = Probe(
            load_diffusion_model(
                inputs.base_model(recipe).directory, device="cuda" if torch.cuda.is_available() else "cpu"
            ),
            [prompt.text for prompt in grammar.sample(plan, recipe.seed)],
            config.images_per_prompt,
            recipe.collect.sampler,
            recipe.seed,
            reward=_several_rewards(recipe, run_dir) if recipe.rewards else reward_of(run_dir / "reward"),
            held_out=reward_of(self.directory / "held_out")
            if config.held_out == JUDGEMENTS
            else make_judge(config.held_out),
            features=lambda images, prompts: features(images, prompts).cpu().numpy(),
            further={name: make_judge(spec) for name, spec in config.measures.items()},
            batch_size=recipe.collect.batch_size,
        )

    def measure(self, step: int, path: str | None) -> dict[str, Any]:
        """A row of measurements.jsonl of a snapshot; of the base model without one."""
        weights = None if path is None else unet_of(Path(path)).state_dict()
        measured, images = self.probe.measure(step, weights)
        sheet = _sheet(images[: _PICTURED_PROMPTS * self.per_prompt], self.per_prompt)
        write_file(self.directory / "pictures" / f"step-{step:08d}.png", encode_png(sheet))
        return measured.as_row()


class _LastFeatures:
    """CLIP features of images, made once for all judges of the same images."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self._images: Pixels | None = None
        self._features: Any = None

    def __call__(self, images: Pixels, prompts: Sequence[str]) -> Any:
        if self._images is not images:
            self._images, self._features = images, self.encoder.image_features(images)
        return self._features


def _several_rewards(recipe: Recipe, run_dir: Path) -> Judge:
    """The recipe's weighted mean of rewards, by the measure of the run's scored candidates."""

    def judge(images_BHWC: Pixels, prompts: Sequence[str]) -> list[float]:
        folder = inputs.image_folder(run_dir)
        digests = [folder.put(encode_png(image)) for image in images_BHWC]
        return rewards_of(recipe, run_dir, pd.DataFrame({"image": digests, "prompt": list(prompts)}))

    return judge


def _has_room(config: RayConfig) -> bool:
    """Whether a training leaves room for what measures it; says what follows where it does not."""
    asked = config.model_copy(update={"threads_per_worker": 1})  # threads are no resource of Ray's
    if cluster.has_room(asked, 1, generators=1):
        return True
    say(
        "Guards: the cluster as it is has no room to measure snapshots beside the training. Unless it grows "
        "they wait until the training has ended, and nothing ends that early. Lower ray.cpus_per_generator, "
        "or set ray.gpus_per_generator to 0, to share the training's GPU."
    )
    return False


def _start_meter(recipe: Recipe, run_dir: Path) -> Any:
    """An actor with the resources of one that generates images."""
    cluster.ensure(recipe.ray)
    import ray

    config = recipe.ray
    actor: Any = ray.remote(num_cpus=config.cpus_per_generator, num_gpus=config.gpus_per_generator)(Meter)
    return actor.remote(recipe, run_dir, config.threads_per_generator)


def learn_held_out(recipe: Recipe, run_dir: Path) -> None:
    """RUN/guards/held_out: a reward learned, as the first was, from the judgements that it never saw.

    Its manifest says how well it ranks the judgements that the first was learned from.
    """
    from accord.evaluation.statistics import auc
    from accord.reward.data import RewardData
    from accord.reward.learn import RewardLearner, split
    from accord.reward.model import RewardModel

    path = run_dir / "work" / "guards" / "judgements.safetensors"
    if not path.exists():
        learn_reward.prepare_data(recipe, run_dir, path)
    tensors = load_tensors(path)
    config = recipe.reward
    seen, left = split(tensors["label_N"], config.validation_fraction, recipe.seed)
    if len(left) < LEAST_JUDGED:
        raise FeedbackError(
            "guards.held_out is judgements, but reward.validation_fraction "
            f"({config.validation_fraction}) keeps only {len(left)} judged images from the reward; expected "
            f"{LEAST_JUDGED} or more. Raise it, collect more judgements, or name another judge in "
            "finetune.guards.held_out"
        )
    chosen = {
        name: value[left] if name.endswith(("_N", "_ND", "_NM")) else value for name, value in tensors.items()
    }
    data = RewardData(**chosen, category_N=("",) * len(left))
    learner = RewardLearner(data, config.model_copy(update={"validation_fraction": 0.0}), recipe.seed)
    for _ in range(config.steps):
        learner.step()
    _, encoder = learn_reward.feature_cache(recipe, run_dir)
    model = RewardModel(learner.trained_head(), encoder, temperature=config.temperature)
    text_ND = tensors["text_KD"][tensors["text_index_N"][seen]]
    scores = model.score_features(tensors["image_ND"][seen], text_ND).cpu().numpy()
    model.save(
        run_dir / DIRECTORY / "held_out",
        inputs={"snapshot": read_manifest(run_dir / "snapshot").digest},
        config={
            "judgements": len(left),
            "auc_on_the_others": float(auc(scores, tensors["label_N"][seen] > 0.5)),
        },
        seed=recipe.seed,
    )


def load_measurements(run_dir: Path) -> list[Measured]:
    """The rows of measurements.jsonl, in the order of measuring; a line that a crash has cut is left out."""
    path = run_dir / DIRECTORY / MEASUREMENTS
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(Measured.from_row(json.loads(line)))
        except ValueError:
            continue
    return rows


def summary(run_dir: Path, config: GuardsConfig) -> dict[str, Any]:
    """What was measured and what the rule says of it, for summary.json."""
    rows = sorted(load_measurements(run_dir), key=lambda row: row.step)
    names = dict.fromkeys(name for row in rows for name in row.by_prompt)
    means = {name: [(row.step, row.mean(name)) for row in rows] for name in names}
    return {
        "decision": decide(rows, config).as_dict(),
        "measures": {
            name: [[step, value if np.isfinite(value) else None] for step, value in points]
            for name, points in means.items()
        },
    }


def _sheet(images_BHWC: Pixels, columns: int) -> NDArray[np.uint8]:
    """A row a prompt."""
    rows = [
        np.concatenate(list(images_BHWC[i : i + columns]), axis=1)
        for i in range(0, len(images_BHWC), columns)
    ]
    return np.concatenate(rows, axis=0)


__all__ = ["HELD_OUT", "REWARD", "Guards", "Meter", "load_measurements"]
