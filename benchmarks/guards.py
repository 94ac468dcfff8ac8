"""A planted reward that loves saturation: what fine-tuning makes of it without guards, and with them.

python -m benchmarks.guards --seeds 3 --json guards.json

Each round draws images of the model as it is by then, rates them by their mean saturation and fine-tunes on
them (DiffusionNFT, no pre-training images: nothing else holds the model back). After each round the guards
measure it; the held-out judge is CLIP's similarity of image and prompt, which nothing is trained on. A
guarded training is the same training, ended where the rule says so: both are read off one run. The
evaluator's success, which neither the training nor the guards see, tells who was right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from accord.config import resolve_path
from accord.diffusion.encode import encode_prompts
from accord.diffusion.finetune import FinetuneConfig, FinetuneData, Finetuner
from accord.diffusion.model import DiffusionModel, load_diffusion_model
from accord.diffusion.sample import SamplerConfig, decode_latents, sample_latents
from accord.guards.measures import Judge, saturation
from accord.guards.probe import Probe
from accord.guards.rule import Decision, Measured, decide
from accord.guards.settings import Bound, GuardsConfig
from accord.images import Pixels
from accord.prompts import Category, PromptPlan, load_grammar
from accord.reward.features import ClipEncoder
from accord.shapes.evaluator import ShapesEvaluator
from accord.shapes.guards import too_many_objects
from benchmarks.tables import describe, spread, table, write_json

MODEL, CLIP = "pkg://accord.shapes/weights/diffusion", "pkg://accord.shapes/weights/clip"
BOUND = GuardsConfig(patience=1000, bounds={"saturation": Bound(most_ratio=1.2)})
SHOWN = ("reward", "held_out", "success", "saturation", "edge_density", "diversity", "reference_distance")


@dataclass(frozen=True)
class Plan:
    """How long, and how hard, the reward is chased."""

    rounds: int = 8
    steps: int = 16
    prompts: int = 16
    images_per_prompt: int = 4
    batch_size: int = 16
    learning_rate: float = 5e-4
    nft_strength: float = 0.2
    guard_prompts: int = 24
    sampler_steps: int = 10

    @property
    def sampler(self) -> SamplerConfig:
        """Of the images that are learned from, and of those that are measured."""
        return SamplerConfig(steps=self.sampler_steps, guidance_scale=2.0)


@dataclass(frozen=True)
class Outcome:
    """One training: all its measurements, and what the rule says of them."""

    measured: list[Measured]
    decision: Decision

    def at(self, step: int) -> Measured:
        """The measurement after `step` steps."""
        return next(row for row in self.measured if row.step == step)


def hack(seed: int, plan: Plan, guards: GuardsConfig, say: Callable[[str], None] = print) -> Outcome:
    """Chases saturation for all rounds, and says in the log when the guards would have ended it."""
    base = load_diffusion_model(resolve_path(MODEL))
    grammar = load_grammar("shapes")
    drawn = grammar.sample(
        PromptPlan(per_category={Category.COMBINATION: plan.prompts + plan.guard_prompts}), seed
    )
    texts = [prompt.text for prompt in drawn]
    probe = make_probe(base, texts[plan.prompts :], seed, plan.sampler)
    measured = [probe.measure(0)[0]]
    say(_line(seed, measured[-1]))
    model, stopped = base, False
    for number in range(plan.rounds):
        model = fine_tune(model, texts[: plan.prompts], seed, number, plan)
        step = (number + 1) * plan.steps
        measured.append(probe.measure(step, model.unet.state_dict())[0])
        decision = decide(measured, guards)
        say(_line(seed, measured[-1]))
        if decision.tripped and not stopped:
            stopped = True
            say(f"seed {seed}: the guards stop it: {decision.reason}; step {decision.best_step} is kept")
    return Outcome(measured, decide(measured, guards))


def _line(seed: int, row: Measured) -> str:
    return f"seed {seed}, step {row.step}: " + ", ".join(f"{name} {row.mean(name):.3f}" for name in SHOWN)


def make_probe(base: DiffusionModel, prompts: Sequence[str], seed: int, sampler: SamplerConfig) -> Probe:
    """Measures with the planted reward, the held-out judge, and the evaluator's success beside them."""
    clip, evaluator, grammar = ClipEncoder(CLIP), ShapesEvaluator(), load_grammar("shapes")

    def similarity(images_BHWC: Pixels, prompts: Sequence[str]) -> Any:
        return (clip.image_features(images_BHWC) * clip.text_features(prompts)).sum(dim=1)

    def success(images_BHWC: Pixels, prompts: Sequence[str]) -> Any:
        return evaluator.measure(images_BHWC, [grammar.parse(text) for text in prompts]).success_B

    further: dict[str, Judge] = {"success": success, "too_many_objects": too_many_objects()}
    return Probe(
        base,
        prompts,
        4,
        sampler,
        seed,
        reward=lambda images, _: saturation(images),
        held_out=similarity,
        features=lambda images, _: clip.image_features(images).numpy(),
        further=further,
    )


def fine_tune(
    model: DiffusionModel, prompts: Sequence[str], seed: int, number: int, plan: Plan
) -> DiffusionModel:
    """One round on images of the model's own, rated by their saturation."""
    each = [prompt for prompt in prompts for _ in range(plan.images_per_prompt)]
    seeds = np.random.default_rng([seed, number]).integers(0, 2**31, len(each)).tolist()
    latents_NCHW = torch.cat(
        [
            sample_latents(model, each[start : start + 32], seeds[start : start + 32], plan.sampler)
            for start in range(0, len(each), 32)
        ]
    )
    reward_N = torch.from_numpy(saturation(decode_latents(model, latents_NCHW))).float()
    prompt_N = torch.arange(len(prompts)).repeat_interleave(plan.images_per_prompt)
    data = FinetuneData(
        latents_NCHW=latents_NCHW,
        text_index_N=prompt_N,
        reward_N=reward_N,
        pretraining_latents_MCHW=latents_NCHW[:0],
        pretraining_text_index_M=prompt_N[:0],
        pretraining_reward_M=reward_N[:0],
        text_KTD=encode_prompts(model, prompts),
        empty_text_TD=encode_prompts(model, [""])[0],
    )
    config = FinetuneConfig(
        objective="diffusion_nft",
        nft_strength=plan.nft_strength,
        steps=plan.steps,
        learning_rate=plan.learning_rate,
        batch_size=plan.batch_size,
        pretraining_batch_size=0,
        beta=0.0,
        ema_decay=0.0,
        adam_betas=(0.9, 0.99),
        weight_decay=0.0,
    )
    tuner = Finetuner(model, data, config, seed + number)
    for _ in range(plan.steps):
        tuner.step()
    return replace(model, unet=tuner.averaged_unet())


def main(
    seeds: Annotated[int, typer.Option(help="How many trainings, each with its own seed.")] = 3,
    rounds: Annotated[int, typer.Option(help="Rounds of a training.")] = Plan.rounds,
    patience: Annotated[int, typer.Option(help="As finetune.guards.patience.")] = 2,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Where to write all numbers.")] = None,
) -> None:
    """Prints a Markdown table of the model before, at the end without guards, and with them."""
    torch.set_num_threads(threads)
    plan, guards = Plan(rounds=rounds), GuardsConfig(every=Plan.steps, patience=patience)
    outcomes = [
        hack(seed, plan, guards, lambda line: print(line, file=sys.stderr, flush=True))
        for seed in range(seeds)
    ]
    last = plan.rounds * plan.steps
    models: dict[str, list[Measured]] = {
        "before": [outcome.at(0) for outcome in outcomes],
        "without guards": [outcome.at(last) for outcome in outcomes],
        "with guards": [
            outcome.at(outcome.decision.best_step if outcome.decision.tripped else last)
            for outcome in outcomes
        ],
    }
    rows = [
        [name, *[spread([row.mean(n) for row in found]) for n in SHOWN]] for name, found in models.items()
    ]
    print(f"\n{describe('cpu')}; {seeds} seeds of {plan}\n")
    print(table(["model", *[name.replace("_", " ") for name in SHOWN]], rows))
    for seed, outcome in enumerate(outcomes):
        alone = decide(outcome.measured, BOUND).reason
        print(f"\nSeed {seed}: {outcome.decision.reason}. With a bound on saturation alone: {alone}.")
    results = [
        {"rows": [row.as_row() for row in outcome.measured], "decision": outcome.decision.as_dict()}
        for outcome in outcomes
    ]
    write_json(json, "cpu", {**vars(plan), "patience": patience, "seeds": seeds}, results)


if __name__ == "__main__":
    typer.run(main)
