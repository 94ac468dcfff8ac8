"""The denoising engine: in-flight batching of samples, each with its own timestep, scheduler and guidance.

    engine = Engine(EngineConfig())
    engine.load("aligned", load_diffusion_model(directory))
    ticket = engine.submit(SampleSpec(model="aligned", prompt="two red stars", seed=7, steps=20, ...))
    image_HWC = ticket.future.result()

One thread runs UNet steps over whatever samples are there: a sample joins at the next step and leaves when it
is done. Only model and size divide them into groups, which take turns. On a GPU a second thread decodes. An
image depends on its spec and the model alone: to within 1/255, bit by bit with one entry in `batch_sizes`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from accord.diffusion.adapters import Conditioning, ModelAdapter, adapter_for
from accord.diffusion.batching import (
    Group,
    Layout,
    LoadedModel,
    Run,
    Sample,
    Ticket,
    denoise,
    layout_of,
)
from accord.diffusion.cuda import Pace
from accord.diffusion.decoding import Decoder
from accord.diffusion.ledger import EngineStats, Ledger
from accord.diffusion.model import DiffusionModel
from accord.diffusion.settings import EngineConfig
from accord.diffusion.specs import SampleSpec
from accord.errors import EngineClosed, EngineError, EngineFull, ModelNotLoaded

__all__ = ["Engine", "EngineConfig", "EngineStats", "SampleSpec", "Ticket"]

logger = logging.getLogger(__name__)
_MOST_FAILED = 16
"""After so many steps that failed, and none that did not, the engine is not healthy."""


class Engine:
    """Makes images of `SampleSpec`s. All methods are safe from any thread; callbacks must be quick, for they
    run in the engine's threads."""

    def __init__(
        self, config: EngineConfig, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self._ledger = Ledger()
        self._lock = self._ledger.changed
        # All below is guarded by the lock, but for Group.runs: those are the engine thread's.
        self._models: dict[str, LoadedModel] = {}
        self._groups: OrderedDict[tuple[int, tuple[int, int, int]], Group] = OrderedDict()
        self._order = 0
        self._swept = True
        self._closing = False
        self._failed_in_a_row = 0  # written by the engine's thread alone
        self._pace = Pace(self.device)
        self._decoder = Decoder(config, self.device, self._ledger.resolve)
        self._thread = threading.Thread(target=self._run, name="accord-engine", daemon=True)
        self._thread.start()

    # ---- what others call

    def load(self, name: str, model: DiffusionModel | ModelAdapter) -> None:
        """Takes the model in, moved to the engine's device and type. A model that has the name is replaced:
        samples that were submitted before keep the one that they were meant for."""
        adapter = adapter_for(model, compiled=self.config.compile)
        adapter.place(self.device, self.dtype)
        loaded = LoadedModel(name, adapter, self.config.text_cache)
        with self._lock:
            self._check_open()
            self._models[name] = loaded

    def unload(self, name: str) -> None:
        """Forgets the model once the samples that it was given are done. Raises ModelNotLoaded."""
        with self._lock:
            if self._models.pop(name, None) is None:
                raise self._not_loaded(name)

    @property
    def models(self) -> list[str]:
        """Names of the loaded models."""
        with self._lock:
            return sorted(self._models)

    @property
    def healthy(self) -> bool:
        """False when the engine is closed, its thread has ended, or one step after another fails (a GPU whose
        context is broken fails for ever)."""
        broken = self._failed_in_a_row >= _MOST_FAILED
        return self._thread.is_alive() and not self._closing and not broken

    def submit(self, spec: SampleSpec, on_step: Callable[[int, int], None] | None = None) -> Ticket:
        """Queues a sample; returns at once. `on_step` gets (steps done, steps) after each step.

        Raises ModelNotLoaded; EngineFull when the queue is; EngineClosed; ConfigError for a size, a scheduler
        or a number that cannot be.
        """
        with self._lock:
            self._check_open()
            model = self._models.get(spec.model)
            if model is None:
                raise self._not_loaded(spec.model)
        shape = model.check(spec)
        plan = model.plan(spec.scheduler, spec.steps)
        ticket = Ticket(spec, len(plan.timesteps))
        with self._lock:
            self._check_open()
            if self._ledger.queued >= self.config.max_queue:
                self._sweep_waiting()
            if self._ledger.queued >= self.config.max_queue:
                self._ledger.count(refused=1)
                raise EngineFull(
                    f"{self._ledger.queued} samples are waiting already (max_queue); try again a little later"
                )
            self._order += 1
            sample = Sample(ticket, model, plan, shape, on_step, time.perf_counter(), self._order)
            key = (id(model), shape)
            if key not in self._groups:
                self._groups[key] = Group(model, shape)
            self._groups[key].waiting.append(sample)
            self._ledger.enter(sample)
            self._lock.notify_all()
        ticket.future.add_done_callback(self._future_done)
        return ticket

    def stats(self) -> EngineStats:
        """A snapshot; all but in_flight and queued only ever grow."""
        return replace(
            self._ledger.stats(), decode_seconds=self._decoder.seconds, decoded=self._decoder.images
        )

    def close(self) -> None:
        """Ends both threads within a step; samples that are not done fail with EngineClosed."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._decoder.close()
        self._fail_all(EngineClosed("the engine was closed before the image was done"))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the engine's thread

    def _run(self) -> None:
        try:
            while not self._closing:
                try:
                    self._turn()
                except Exception as error:  # a bug: say so, fail what may be touched by it, and go on
                    logger.exception("the denoising engine failed")
                    self._fail_all(_failure("the engine failed", error))
        finally:
            if not self._closing:  # not an Exception: nobody would ever answer
                self._closing = True
                self._fail_all(EngineClosed("the engine's thread was ended"))

    def _turn(self) -> None:
        """Waits for work, lets samples in, and makes one step of the group whose turn it is."""
        with self._lock:
            self._lock.wait_for(self._has_work)
            if self._closing:
                return
            if not self._swept:
                self._sweep_waiting()
                self._sweep_running()
            admitted = self._admit()
            self._forget_idle()
        self._begin(admitted)
        group = self._next_group()
        if group is not None:
            self._step(group)
        self._decoder.work()

    def _has_work(self) -> bool:
        return (
            self._closing
            or not self._swept
            or any(group.runs for group in self._groups.values())
            or self._oldest() is not None
        )

    def _oldest(self) -> Group | None:
        """The group whose head has waited longest, of those that have room."""
        if self._ledger.held >= self.config.max_samples:
            return None
        room = [
            group
            for group in self._groups.values()
            if group.waiting and group.admitted_rows + group.waiting[0].spec.rows <= self.config.max_batch
        ]
        return min(room, key=lambda group: group.waiting[0].order, default=None)

    def _admit(self) -> dict[Group, list[Sample]]:
        admitted: dict[Group, list[Sample]] = {}
        now_s = time.perf_counter()
        while (group := self._oldest()) is not None:
            sample = group.waiting.popleft()
            group.admitted_rows += sample.spec.rows
            self._ledger.begin(sample, now_s)
            admitted.setdefault(group, []).append(sample)
        return admitted

    @torch.inference_mode()
    def _begin(self, admitted: dict[Group, list[Sample]]) -> None:
        for group, samples in admitted.items():
            ready = []
            for sample in samples:
                try:
                    sample.conditioning = self._text(group.model, sample.spec.prompt)
                    if sample.spec.guided:
                        negative = sample.spec.negative_prompt
                        sample.negative = self._text(group.model, negative, negative=True)
                    ready.append(sample)
                except Exception as error:
                    logger.exception("encoding a prompt failed")
                    self._leave(group, [sample], _failure("the prompt could not be encoded", error))
            group.begin(ready, self.device)

    def _text(self, model: LoadedModel, prompt: str, *, negative: bool = False) -> Conditioning:
        conditioning, hit = model.text(prompt, negative=negative)
        self._ledger.count(**{"cache_hits" if hit else "cache_misses": 1})
        return conditioning

    def _next_group(self) -> Group | None:
        with self._lock:
            for key, group in self._groups.items():
                if group.runs:
                    self._groups.move_to_end(key)
                    return group
        return None

    @torch.inference_mode()
    def _step(self, group: Group) -> None:
        started_s = time.perf_counter()
        samples = group.samples
        try:
            outputs, layout = group.outputs(self.config.batch_sizes, self.device)
        except Exception as error:
            logger.exception("a step of %d samples of model %s failed", samples, group.model.name)
            self._step_singly(group, error)
            return
        for run, output_BCHW in zip(list(group.runs), outputs, strict=True):
            self._advance(group, run, output_BCHW)
        self._pace.launched()
        self._count_step(layout, time.perf_counter() - started_s)

    def _count_step(self, layout: Layout, seconds: float) -> None:
        self._failed_in_a_row = 0
        self._ledger.count(
            steps=1,
            sample_steps=layout.samples,
            rows=layout.rows,
            padding=layout.padding,
            row_slots=self.config.max_batch,
            step_seconds=seconds,
        )

    def _step_singly(self, group: Group, error: Exception) -> None:
        """After a batch failed: each of its samples alone, so that only the guilty fail (none, if the batch
        was too large for the device's memory)."""
        runs = [single for run in group.runs for single in run.singles()]
        group.runs = list(runs)
        group.changed()
        for run in runs:
            started_s = time.perf_counter()
            if len(runs) > 1:
                try:
                    layout = layout_of([run], self.config.batch_sizes, self.device)
                    output_BCHW = denoise(group.model.adapter, [run], layout, self.device)[0]
                except Exception as alone:
                    self._failed_in_a_row += 1
                    self._drop(group, run, _failure("a denoising step failed", alone))
                    continue
                self._advance(group, run, output_BCHW)
                self._count_step(layout, time.perf_counter() - started_s)
            else:
                self._failed_in_a_row += 1
                self._drop(group, run, _failure("a denoising step failed", error))

    def _advance(self, group: Group, run: Run, output_BCHW: Tensor) -> None:
        try:
            run.cohort.advance(output_BCHW)
        except Exception as error:
            logger.exception("a scheduler's step failed")
            self._drop(group, run, _failure("the scheduler's step failed", error))
            return
        done = run.cohort.done
        for sample in run.samples:
            sample.ticket.steps_done = done
            if sample.on_step is not None:
                self._report(sample, done)
        if run.cohort.finished:
            group.runs.remove(run)
            group.changed()
            self._leave(group, run.samples)
            self._decoder.put(run.samples, run.cohort.latents_BCHW)

    def _report(self, sample: Sample, done: int) -> None:
        try:
            if sample.on_step is not None:
                sample.on_step(done, sample.ticket.steps)
        except Exception:
            logger.exception("an on_step callback failed; it is not called again")
            sample.on_step = None

    # ---- leaving

    def _drop(self, group: Group, run: Run, error: EngineError) -> None:
        group.runs.remove(run)
        group.changed()
        self._leave(group, run.samples, error)

    def _leave(self, group: Group, samples: list[Sample], error: EngineError | None = None) -> None:
        """Samples give back their rows: to be decoded, or with an error."""
        with self._lock:
            group.admitted_rows -= sum(sample.spec.rows for sample in samples)
        if error is not None:
            for sample in samples:
                self._ledger.resolve(sample, error)

    def _future_done(self, future: Any) -> None:
        if future.cancelled():
            with self._lock:
                self._swept = False
                self._lock.notify_all()

    def _sweep_waiting(self) -> None:
        for group in self._groups.values():
            gone = [sample for sample in group.waiting if sample.ticket.future.cancelled()]
            for sample in gone:
                group.waiting.remove(sample)
                self._ledger.resolve(sample, EngineError("cancelled"))

    def _sweep_running(self) -> None:
        """Of the engine's thread: a cancelled sample gives back its slot before the next step."""
        self._swept = True
        for group in self._groups.values():
            for run in list(group.runs):
                rows = range(len(run.samples))
                kept = [row for row in rows if not run.samples[row].ticket.future.cancelled()]
                if len(kept) == len(run.samples):
                    continue
                gone = [run.samples[row] for row in rows if row not in kept]
                if kept:
                    run.keep(kept)
                else:
                    group.runs.remove(run)
                group.changed()
                self._leave(group, gone, EngineError("cancelled"))

    def _forget_idle(self) -> None:
        for key, group in list(self._groups.items()):
            if not group.waiting and not group.admitted_rows:
                del self._groups[key]

    def _fail_all(self, error: EngineError) -> None:
        with self._lock:
            self._groups.clear()
        for sample in self._ledger.outstanding():
            self._ledger.resolve(sample, error)

    def _check_open(self) -> None:
        if self._closing:
            raise EngineClosed("the engine is closed")

    def _not_loaded(self, name: str) -> ModelNotLoaded:
        loaded = ", ".join(sorted(self._models)) or "none"
        return ModelNotLoaded(f"no model {name!r} is loaded; loaded: {loaded}")


def _failure(what: str, error: Exception) -> EngineError:
    failure = EngineError(f"{what}: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
