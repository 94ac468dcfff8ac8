"""Scheduler steps of samples that go together: one copy of a prepared scheduler moves them all.

Arithmetic of the schedulers in TOGETHER is elementwise over the samples, so that stacking them changes no bit
and a step of sixteen costs what a step of one costs. Samples of any other scheduler move one by one.

Shapes: B samples of a cohort, C H W of latents.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accord.diffusion.adapters import ModelAdapter
from accord.diffusion.sample import draw_noise, seeded_generators
from accord.errors import ConfigError

TOGETHER = frozenset(
    {
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "UniPCMultistepScheduler",
    }
)
"""Schedulers whose steps are known to be elementwise and whose tensors are never changed in place."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A scheduler prepared for a number of steps. Never stepped itself: `start` copies it, which is much
    cheaper than preparing one."""

    scheduler: Any
    timesteps: tuple[Tensor, ...]
    """0-dimensional, on the CPU: a step then never waits for the device."""
    times: tuple[float, ...]
    together: bool
    draws_noise: bool

    @staticmethod
    def make(adapter: ModelAdapter, name: str, steps: int) -> Plan:
        """Raises ConfigError when diffusers has no such scheduler or it cannot make so many steps."""
        scheduler = adapter.scheduler(name)
        most = int(scheduler.config.num_train_timesteps)
        if not 1 <= steps <= most:
            raise ConfigError(
                f"steps must be from 1 to {most}, which the model was trained with, got {steps}"
            )
        try:
            scheduler.set_timesteps(steps, device="cpu")
        except (ValueError, AssertionError, IndexError, ZeroDivisionError) as error:
            raise ConfigError(f"{name} cannot make {steps} steps: {error}") from None
        timesteps = tuple(scheduler.timesteps.unbind())
        return Plan(
            scheduler=scheduler,
            timesteps=timesteps,
            times=tuple(float(timestep) for timestep in timesteps),
            together=name in TOGETHER,
            draws_noise="generator" in inspect.signature(scheduler.step).parameters,
        )

    def copied(self, scheduler: Any) -> Any:
        """A copy of a scheduler of this plan, at the step where it is."""
        if not self.together:
            return copy.deepcopy(scheduler)
        clone = copy.copy(scheduler)
        for name, value in vars(clone).items():
            if isinstance(value, list):  # of past model outputs, which a step replaces in place
                setattr(clone, name, list(value))
        return clone


class Cohort:
    """Samples that began together with the same plan, and so are at the same step."""

    def __init__(self, plan: Plan, seeds: Sequence[int], shape: tuple[int, int, int], device: Any) -> None:
        self.plan = plan
        self.scheduler = plan.copied(plan.scheduler)
        self.generators = seeded_generators(seeds)
        noise_BCHW = draw_noise(self.generators, shape).to(device)
        self.latents_BCHW: Tensor = noise_BCHW * self.scheduler.init_noise_sigma
        self.done = 0

    @property
    def finished(self) -> bool:
        return self.done >= len(self.plan.timesteps)

    @property
    def time(self) -> float:
        """The timestep that comes next."""
        return self.plan.times[self.done]

    def inputs(self) -> Tensor:
        """What the UNet is to see: inputs_BCHW."""
        scaled_BCHW: Tensor = self.scheduler.scale_model_input(
            self.latents_BCHW, self.plan.timesteps[self.done]
        )
        return scaled_BCHW

    def advance(self, output_BCHW: Tensor) -> None:
        """One scheduler step."""
        options = {"generator": self.generators} if self.plan.draws_noise else {}
        timestep = self.plan.timesteps[self.done]
        self.latents_BCHW = self.scheduler.step(
            output_BCHW, timestep, self.latents_BCHW, return_dict=False, **options
        )[0]
        self.done += 1

    def alone(self, row: int) -> Cohort:
        """A copy with the sample of `row` only."""
        clone = copy.copy(self)
        clone.scheduler = self.plan.copied(self.scheduler)
        clone.keep([row])
        return clone

    def keep(self, rows: Sequence[int]) -> None:
        """Forgets all samples but those of `rows`, also in what the scheduler remembers of past steps."""
        shape = self.latents_BCHW.shape
        index = torch.tensor(rows, device=self.latents_BCHW.device)

        def kept(value: Any) -> Any:
            if isinstance(value, Tensor) and value.shape == shape:
                return value[index]
            return value

        for name, value in list(vars(self.scheduler).items()):
            if isinstance(value, list):
                setattr(self.scheduler, name, [kept(item) for item in value])
            elif isinstance(value, Tensor):
                setattr(self.scheduler, name, kept(value))
        self.latents_BCHW = self.latents_BCHW[index]
        self.generators = [self.generators[row] for row in rows]
