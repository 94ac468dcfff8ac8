"""Samples, and the batches that the engine makes of them. No threads here: engine.py has those.

Shapes: N samples of a batch; B rows of the UNet's (a guided sample has two, padding may follow); G guided
samples; C H W of latents.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from accord.diffusion.adapters import Conditioning, ModelAdapter, Pixels
from accord.diffusion.specs import SampleSpec
from accord.diffusion.steppers import Cohort, Plan
from accord.errors import ConfigError

PLANS = 256
"""Prepared schedulers kept for each model."""


class Ticket:
    """A sample on its way. `future` becomes the image_HWC; cancelling it or the ticket frees the slot
    within one step."""

    def __init__(self, spec: SampleSpec, steps: int) -> None:
        self.spec = spec
        self.future: Future[Pixels] = Future()
        self.steps = steps
        """Denoising steps that the scheduler makes of spec.steps."""
        self.steps_done = 0

    def cancel(self) -> bool:
        """False when the image is done already."""
        return self.future.cancel()


@dataclass(eq=False)
class Sample:
    """A ticket with what the engine must know to work on it."""

    ticket: Ticket
    model: LoadedModel
    plan: Plan
    shape: tuple[int, int, int]
    """C, H, W of the latents."""
    on_step: Callable[[int, int], None] | None
    submitted_s: float
    order: int
    """Of submission."""
    begun: bool = False
    conditioning: Conditioning = field(default_factory=dict)
    negative: Conditioning | None = None

    @property
    def spec(self) -> SampleSpec:
        return self.ticket.spec


class LoadedModel:
    """A model under its name, with its prepared schedulers and encoded prompts. Samples keep it alive, so a
    model that is unloaded or replaced ends what it began."""

    def __init__(self, name: str, adapter: ModelAdapter, text_cache: int) -> None:
        self.name = name
        self.adapter = adapter
        self._text_cache = text_cache
        self._texts: OrderedDict[tuple[str, bool], Conditioning] = OrderedDict()
        self._plans: OrderedDict[tuple[str, int], Plan] = OrderedDict()
        self._plans_lock = threading.Lock()

    def plan(self, scheduler: str, steps: int) -> Plan:
        """The prepared scheduler; safe from any thread. Raises ConfigError as `Plan.make`."""
        with self._plans_lock:
            key = (scheduler, steps)
            plan = self._plans.get(key)
            if plan is None:
                plan = self._plans[key] = Plan.make(self.adapter, scheduler, steps)
                if len(self._plans) > PLANS:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(key)
            return plan

    def text(self, prompt: str, *, negative: bool) -> tuple[Conditioning, bool]:
        """The encoded prompt, and whether it was there already; of the engine's thread only."""
        key = (prompt, negative)
        found = self._texts.get(key)
        if found is not None:
            self._texts.move_to_end(key)
            return found, True
        made = self.adapter.encode(prompt, negative=negative)
        self._texts[key] = made
        if len(self._texts) > self._text_cache:
            self._texts.popitem(last=False)
        return made, False

    def check(self, spec: SampleSpec) -> tuple[int, int, int]:
        """The shape of the latents. Raises ConfigError for what no step could mend."""
        factor = self.adapter.pixels_per_latent
        if spec.height % factor or spec.width % factor or spec.height < factor or spec.width < factor:
            raise ConfigError(
                f"height and width must be multiples of {factor} pixels, got {spec.height} x {spec.width}"
            )
        if not math.isfinite(spec.guidance_scale):
            raise ConfigError(f"guidance_scale must be a finite number, got {spec.guidance_scale}")
        if not -(2**63) <= spec.seed < 2**64:
            raise ConfigError(f"seed must fit in 64 bits, got {spec.seed}")
        return self.adapter.latent_channels, spec.height // factor, spec.width // factor


@dataclass(eq=False)
class Run:
    """A cohort, and whose samples are in its rows."""

    cohort: Cohort
    samples: list[Sample]

    def keep(self, rows: Sequence[int]) -> None:
        if len(rows) < len(self.samples):
            self.cohort.keep(rows)
            self.samples = [self.samples[row] for row in rows]

    def singles(self) -> list[Run]:
        """The same samples, each in a cohort of its own."""
        if len(self.samples) == 1:
            return [self]
        return [Run(self.cohort.alone(row), [sample]) for row, sample in enumerate(self.samples)]


@dataclass(frozen=True, eq=False)
class Layout:
    """Whose rows are where in a UNet batch: each sample with its prompt, then the guided ones with their
    negative prompt, then padding. It holds as long as the same samples are running."""

    samples: int
    rows: int
    padding: int
    guided_G: Tensor | None
    """Numbers of the guided samples; None when all are."""
    scales_G111: Tensor | None
    """None when no sample is guided."""
    conditioning: Conditioning

    @staticmethod
    def of(samples: Sequence[Sample], batch_sizes: Iterable[int], device: torch.device) -> Layout:
        guided = [number for number, sample in enumerate(samples) if sample.negative is not None]
        rows = [sample.conditioning for sample in samples]
        rows += [negative for sample in samples if (negative := sample.negative) is not None]
        padding = min((size for size in batch_sizes if size >= len(rows)), default=len(rows)) - len(rows)
        rows_B = [*rows, *([rows[-1]] * padding)]
        scales = [samples[number].spec.guidance_scale for number in guided]
        return Layout(
            samples=len(samples),
            rows=len(rows),
            padding=padding,
            guided_G=None if len(guided) == len(samples) else torch.tensor(guided, device=device),
            scales_G111=torch.tensor(scales, device=device).view(-1, 1, 1, 1) if guided else None,
            conditioning={name: torch.stack([row[name] for row in rows_B]) for name in rows_B[0]},
        )

    def spread(self, values_N: Tensor) -> Tensor:
        """values_B of the rows from values_N of the samples."""
        parts = [values_N]
        if self.scales_G111 is not None:
            parts.append(values_N if self.guided_G is None else values_N[self.guided_G])
        if self.padding:
            parts.append(parts[-1][-1:].expand(self.padding, *values_N.shape[1:]))
        return torch.cat(parts) if len(parts) > 1 else values_N

    def guide(self, output_BCHW: Tensor) -> Tensor:
        """output_NCHW of the samples, guided where they are (Ho & Salimans 2022)."""
        led_NCHW = output_BCHW[: self.samples]
        if self.scales_G111 is None:
            return led_NCHW
        free_GCHW = output_BCHW[self.samples : self.rows]
        if self.guided_G is None:
            return free_GCHW + self.scales_G111 * (led_NCHW - free_GCHW)
        led_GCHW = led_NCHW[self.guided_G]
        output_NCHW = led_NCHW.clone()
        output_NCHW[self.guided_G] = free_GCHW + self.scales_G111 * (led_GCHW - free_GCHW)
        return output_NCHW


class Group:
    """The samples that can share a batch: of one model and one size."""

    def __init__(self, model: LoadedModel, shape: tuple[int, int, int]) -> None:
        self.model = model
        self.shape = shape
        self.waiting: deque[Sample] = deque()
        self.admitted_rows = 0
        """Rows of the samples that left `waiting` and are not done; of the engine's lock."""
        self.runs: list[Run] = []
        self._layout: Layout | None = None

    @property
    def samples(self) -> int:
        return sum(len(run.samples) for run in self.runs)

    def changed(self) -> None:
        """Who is running changed."""
        self._layout = None

    def begin(self, admitted: Sequence[Sample], device: torch.device) -> None:
        """Starts samples whose prompts are encoded; those with the same plan move together."""
        plans: dict[Plan, list[Sample]] = {}
        for sample in admitted:
            plans.setdefault(sample.plan, []).append(sample)
        for plan, samples in plans.items():
            alike = [samples] if plan.together else [[sample] for sample in samples]
            for part in alike:
                seeds = [sample.spec.seed for sample in part]
                self.runs.append(Run(Cohort(plan, seeds, self.shape, device), part))
        self.changed()

    def outputs(self, batch_sizes: Iterable[int], device: torch.device) -> tuple[list[Tensor], Layout]:
        """One UNet call for all that run: guided output_BCHW of each run."""
        if self._layout is None:
            self._layout = layout_of(self.runs, batch_sizes, device)
        return denoise(self.model.adapter, self.runs, self._layout, device), self._layout


def layout_of(runs: Sequence[Run], batch_sizes: Iterable[int], device: torch.device) -> Layout:
    return Layout.of(list(itertools.chain.from_iterable(run.samples for run in runs)), batch_sizes, device)


def denoise(adapter: ModelAdapter, runs: Sequence[Run], layout: Layout, device: torch.device) -> list[Tensor]:
    """One UNet call: guided output_BCHW of each run. Changes nothing, so that it can be tried again."""
    inputs_NCHW = torch.cat([run.cohort.inputs() for run in runs])
    times = [run.cohort.time for run in runs for _ in run.samples]
    # float32 holds every integer timestep exactly, and the UNet's embedding is made of floats anyway.
    times_N = torch.tensor(times, dtype=torch.float32).to(device, non_blocking=True)
    output_BCHW = adapter.denoise(layout.spread(inputs_NCHW), layout.spread(times_N), layout.conditioning)
    output_NCHW = layout.guide(output_BCHW)
    return list(torch.split(output_NCHW, [len(run.samples) for run in runs]))
