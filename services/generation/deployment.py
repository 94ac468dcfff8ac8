"""The denoising engine as a deployment: one call draws one candidate."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from accord.config import resolve_path, validate
from accord.cpu import use_cpu
from accord.diffusion.settings import EngineConfig
from accord.diffusion.specs import SampleSpec
from accord.errors import ConfigError, EngineClosed, EngineFull
from services.config import GenerationSettings
from services.generation.messages import Busy, Drawn, Outcome, Refused, Steps
from services.metrics import EngineMetrics
from services.models import Catalogue, Missing, Shelf, as_table

if TYPE_CHECKING:  # torch and diffusers take seconds to import, and who deploys needs neither
    from accord.diffusion.engine import Engine, Ticket
    from accord.diffusion.model import DiffusionModel
    from accord.diffusion.process_engine import ProcessEngine

PROGRESS_S = 0.2
HOUSEKEEPING_S = 1.0


class Generation:
    """A replica. `settings` is a dumped GenerationSettings."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        from accord.diffusion.engine import Engine
        from accord.diffusion.process_engine import ProcessEngine

        self._settings = GenerationSettings.model_validate(settings)
        engine = self._settings.engine
        use_cpu(engine.threads)
        config = validate(EngineConfig, dict(engine.options), "generation.engine.options")
        dtype = getattr(torch, engine.dtype)
        self._engine: Engine | ProcessEngine = (
            ProcessEngine(config, device=engine.device, dtype=dtype, threads=engine.threads)
            if engine.own_process or (engine.own_process is None and engine.device == "cpu")
            else Engine(config, device=engine.device, dtype=dtype)
        )
        self._shelf: Shelf[DiffusionModel] = Shelf(
            load_model,
            lambda model: model.digest,
            ThreadPoolExecutor(1, "model loader"),
            engine.retire_after_s,
            opened=lambda model: self._engine.load(model.digest, model),
            closed=lambda model: self._engine.unload(model.digest),
            describe=sizes,
        )
        self._metrics = EngineMetrics()
        self._reported: dict[str, float] = {}
        self._failures = 0
        self._keeping: asyncio.Task[None] | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        await self._shelf.apply(as_table(user_config))
        if self._keeping is None:
            self._keeping = asyncio.create_task(self._housekeeping())

    async def catalogue(self) -> Catalogue:
        return self._shelf.catalogue()

    async def draw(self, spec: SampleSpec) -> Outcome:
        """Cancelling the call frees the engine's slot within one step."""
        with self._shelf.use(spec.model) as model:
            if model is None:
                return Missing(spec.model)
            ticket = self._submit(spec)
            if isinstance(ticket, Busy | Refused):
                return ticket
            try:
                return Drawn(await asyncio.wrap_future(ticket.future))
            except EngineClosed:
                return Busy()
            finally:
                ticket.cancel()

    async def draw_watched(self, spec: SampleSpec) -> AsyncIterator[Steps | Outcome]:
        """The same, with the steps done about five times a second; the outcome comes last."""
        with self._shelf.use(spec.model) as model:
            if model is None:
                yield Missing(spec.model)
                return
            ticket = self._submit(spec)
            if isinstance(ticket, Busy | Refused):
                yield ticket
                return
            told = 0
            try:
                future = asyncio.wrap_future(ticket.future)
                while not future.done():
                    await asyncio.wait([future], timeout=PROGRESS_S)
                    if not future.done() and ticket.steps_done != told:
                        told = ticket.steps_done
                        yield Steps(told)
                yield Drawn(await future)
            except EngineClosed:
                yield Busy()
            finally:
                ticket.cancel()

    async def stats(self) -> dict[str, float]:
        """The engine's counters, and this replica's process id."""
        return {**asdict(await asyncio.to_thread(self._engine.stats)), "process_id": os.getpid()}

    async def settled(self) -> None:
        """Returns when the models that were last asked for are loaded."""
        await self._shelf.settled()

    async def check_health(self) -> None:
        if not self._engine.healthy:
            raise RuntimeError("the denoising engine has ended")

    def _submit(self, spec: SampleSpec) -> Ticket | Busy | Refused:
        try:
            return self._engine.submit(spec)
        except (EngineFull, EngineClosed):
            return Busy()
        except ConfigError as error:
            return Refused(str(error))

    async def _housekeeping(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            await self._shelf.sweep()
            self._report(asdict(await asyncio.to_thread(self._engine.stats)))

    def _report(self, stats: dict[str, float]) -> None:
        grown = {key: value - self._reported.get(key, 0) for key, value in stats.items()}
        self._reported = stats
        if self._shelf.failures > self._failures:
            self._metrics.load_failures.inc(self._shelf.failures - self._failures)
            self._failures = self._shelf.failures
        for key, counter in self._metrics.counters.items():
            if grown[key] > 0:
                counter.inc(grown[key])
        self._metrics.in_flight.set(stats["in_flight"])
        self._metrics.queued.set(stats["queued"])
        if grown["row_slots"] > 0:
            self._metrics.occupancy.set(grown["rows"] / grown["row_slots"])
        if grown["steps"] > 0:
            self._metrics.step.set(grown["step_seconds"] / grown["steps"])
        if grown["begun"] > 0:
            self._metrics.queue.set(grown["queue_seconds"] / grown["begun"])


def load_model(directory: str) -> DiffusionModel:
    """On the CPU: the engine moves it to its device."""
    from accord.diffusion.model import load_diffusion_model

    return load_diffusion_model(resolve_path(directory))


def sizes(model: DiffusionModel) -> dict[str, int]:
    """The size of a request that names none, and the grid: a size that the UNet's levels can halve."""
    height, width = model.default_size
    levels = len(model.unet.config.block_out_channels)
    return {"multiple": model.vae_scale_factor * 2 ** (levels - 1), "height": height, "width": width}
