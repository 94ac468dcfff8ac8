"""One request for images: candidates drawn in parallel, scored, ranked; within its time, and of one model."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

import accord
from accord.diffusion.seeds import candidate_seed
from accord.diffusion.specs import SampleSpec
from accord.v1 import generation_pb2 as pb
from services.config import CanarySettings, Limits
from services.gateway import validation
from services.gateway.backend import Backend, ModelGone, Models
from services.gateway.canary import Role
from services.gateway.canary import role as canary_role
from services.gateway.errors import Reason, RequestError
from services.gateway.pictures import encode
from services.gateway.validation import Plan, Sampling
from services.reward.messages import ScoreRequest

logger = logging.getLogger("ray.serve")

PROGRESS_S = 0.2
RESTARTS = 5
OUT_OF_TIME = (Reason.REQUEST_TIMEOUT, Reason.TIME_BUDGET_SPENT)
Emit = Callable[[pb.StreamImagesResponse], None]


@dataclass
class Candidate:
    """A drawn and scored image; `pixels` (HWC) until it is encoded."""

    index: int
    pixels: NDArray[np.uint8]
    reward: float
    similarity: float
    image_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    data: bytes = b""


@dataclass
class Result:
    """The candidates to return, best first, and the summary."""

    kept: list[Candidate]
    summary: pb.GenerationSummary
    models: Models
    role: Role


class Session:
    """Draws what one `Plan` asks for. With `emit`, tells what happens while it does."""

    def __init__(
        self,
        backend: Backend,
        plan: Plan,
        limits: Limits,
        encoder: Executor,
        request_id: str,
        emit: Emit | None = None,
        canary: CanarySettings | None = None,
    ) -> None:
        self._backend, self._plan, self._limits = backend, plan, limits
        self._encoder, self._request_id, self._emit = encoder, request_id, emit
        self._canary = canary
        self._begun = time.monotonic()
        self._deadline = self._begun + (plan.time_budget_s or limits.request_timeout_s)
        self._ready: list[Candidate] = []
        self._steps: dict[int, int] = {}
        self._digest = ""
        self._told = (0.0, -1)

    async def run(self) -> Result:
        """Raises RequestError. A model that is unloaded meanwhile makes it begin again with the same seed:
        the result is of one model. What the canary fails at, the default draws."""
        role = canary_role(self._plan.model, self._request_id, self._canary)
        if role is not Role.CANARY:
            return await self._run_as(role, self._plan.model)
        assert self._canary is not None
        if not await self._backend.has_model(self._canary.model):
            return await self._run_as(Role.CHAMPION, "")
        try:
            return await self._run_as(role, self._canary.model)
        except Exception as error:
            if isinstance(error, RequestError) and error.reason in OUT_OF_TIME:
                raise
            refused = _is_refusal(error)
            cause = error.reason.value if isinstance(error, RequestError) else type(error).__name__
            logger.warning("request %s: the canary failed (%s), the default draws", self._request_id, cause)
        failed_digest = self._digest
        result = await self._run_as(Role.CHAMPION, "")
        if refused:  # and the default did not: a fault of the canary
            self._backend.metrics.count_model(role.value, failed_digest, None)
        return result

    async def _run_as(self, role: Role, model: str) -> Result:
        begun = time.monotonic()
        for _ in range(RESTARTS):
            models = await self._backend.resolve(model, self._plan.reward_model)
            self._ready, self._steps, self._digest = [], {}, models.diffusion.digest
            try:
                result = await self._run_with(role, models)
            except ModelGone:
                await self._backend.refresh()
                continue
            except Exception as error:
                if not _is_refusal(error):
                    self._backend.metrics.count_model(role.value, self._digest, None)
                raise
            self._backend.metrics.count_model(role.value, self._digest, time.monotonic() - begun)
            return result
        raise RequestError(
            Reason.BACKEND_UNAVAILABLE, "the models are being changed; try again soon", retry_after_s=2.0
        )

    async def _run_with(self, role: Role, models: Models) -> Result:
        sampling = self._sized(models)
        self._tell_accepted(models)
        reason = await self._draw_all(models, sampling)
        return await self._finish(role, models, sampling, reason)

    def _sized(self, models: Models) -> Sampling:
        return with_size(self._plan.sampling, models, "spec")

    async def _draw_all(self, models: Models, sampling: Sampling) -> pb.FinishReason.ValueType:
        window = parallel(self._plan, self._limits)
        waiting = iter(range(self._plan.num_candidates))
        running: set[asyncio.Task[Candidate]] = set()
        try:
            while True:
                for index in waiting if len(running) < window else ():
                    running.add(asyncio.create_task(self._candidate(models, sampling, index)))
                    if len(running) >= window:
                        break
                if not running:
                    return pb.FINISH_REASON_COMPLETED
                left = self._deadline - time.monotonic()
                timeout = min(left, PROGRESS_S) if self._emit else left
                done, running = await asyncio.wait(
                    running, timeout=max(0.0, timeout), return_when=asyncio.FIRST_COMPLETED
                )
                for failure in [task.exception() for task in done if task.exception()]:
                    assert failure is not None
                    raise failure
                for task in done:
                    self._ready.append(task.result())
                    await self._tell_image(models, sampling, self._ready[-1])
                self._tell_progress()
                if self._accepted():
                    return pb.FINISH_REASON_ACCEPTED
                if running and time.monotonic() >= self._deadline:
                    return self._out_of_time()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _candidate(self, models: Models, sampling: Sampling, index: int) -> Candidate:
        def on_steps(done: int) -> None:
            self._steps[index] = done

        spec = sample_spec(models.diffusion.digest, sampling, self._plan.seed, index)
        pixels = await self._backend.draw(spec, on_steps if self._emit else None)
        self._steps[index] = sampling.steps
        scores = await self._backend.score(ScoreRequest(models.reward.digest, [pixels], [sampling.prompt]))
        return Candidate(index, pixels, scores.rewards[0], scores.similarities[0])

    def _accepted(self) -> bool:
        least = self._plan.accept_reward
        if least is None or len(self._ready) == self._plan.num_candidates:
            return False
        return sum(candidate.reward >= least for candidate in self._ready) >= self._plan.num_images

    def _out_of_time(self) -> pb.FinishReason.ValueType:
        if self._plan.time_budget_s is None:
            raise RequestError(
                Reason.REQUEST_TIMEOUT,
                f"not done after {self._limits.request_timeout_s:.0f} s, the server's limit: ask for less, "
                "or give a time_budget to get the best so far",
            )
        if not self._ready:
            raise RequestError(
                Reason.TIME_BUDGET_SPENT,
                f"no image was ready within {self._plan.time_budget_s:g} s, the time_budget; give more time",
            )
        return pb.FINISH_REASON_TIME_BUDGET

    async def _finish(
        self, role: Role, models: Models, sampling: Sampling, reason: pb.FinishReason.ValueType
    ) -> Result:
        kept = ranked(self._ready)[: self._plan.num_images]
        await self._encode(models, sampling, kept)
        summary = pb.GenerationSummary(
            finish_reason=reason,
            candidates_done=len(self._ready),
            seed=self._plan.seed,
            model_digest=models.diffusion.digest,
            reward_model_digest=models.reward.digest,
        )
        summary.elapsed.FromNanoseconds(int((time.monotonic() - self._begun) * 1e9))
        return Result(kept, summary, models, role)

    async def _encode(self, models: Models, sampling: Sampling, candidates: Iterable[Candidate]) -> None:
        loop = asyncio.get_running_loop()
        waiting = [candidate for candidate in candidates if not candidate.data]
        encoded = await asyncio.gather(
            *(
                loop.run_in_executor(
                    self._encoder,
                    encode,
                    candidate.pixels,
                    self._plan.mime_type,
                    manifest(models, sampling, self._plan.seed, candidate.index),
                )
                for candidate in waiting
            )
        )
        for candidate, data in zip(waiting, encoded, strict=True):
            candidate.data = data

    def image(self, result: Result, candidate: Candidate, rank: int) -> pb.Image:
        """The message of a candidate that is encoded."""
        return self._image(result.models, self._sized(result.models), candidate, rank)

    def _image(self, models: Models, sampling: Sampling, candidate: Candidate, rank: int) -> pb.Image:
        return image_message(
            candidate,
            self._plan.mime_type,
            manifest(models, sampling, self._plan.seed, candidate.index),
            rank,
        )

    def _tell_accepted(self, models: Models) -> None:
        if self._emit:
            accepted = pb.Accepted(
                request_id=self._request_id,
                seed=self._plan.seed,
                num_candidates=self._plan.num_candidates,
                model_digest=models.diffusion.digest,
                reward_model_digest=models.reward.digest,
            )
            self._emit(pb.StreamImagesResponse(accepted=accepted))

    async def _tell_image(self, models: Models, sampling: Sampling, candidate: Candidate) -> None:
        if self._emit:
            await self._encode(models, sampling, [candidate])
            self._emit(pb.StreamImagesResponse(image=self._image(models, sampling, candidate, 0)))

    def _tell_progress(self) -> None:
        """At most about five times a second, and only what is new; the last one is always told."""
        if not self._emit:
            return
        done, now = sum(self._steps.values()), time.monotonic()
        complete = len(self._ready) == self._plan.num_candidates
        if (done == self._told[1] and not complete) or (now - self._told[0] < PROGRESS_S and not complete):
            return
        self._told = (now, done)
        total = self._plan.num_candidates
        progress = pb.Progress(
            steps_done=done,
            steps_total=total * self._plan.sampling.steps,
            candidates_done=len(self._ready),
            candidates_total=total,
        )
        self._emit(pb.StreamImagesResponse(progress=progress))


def _is_refusal(error: Exception) -> bool:
    """Whether the fault is the request's, as far as one model can tell."""
    return isinstance(error, RequestError) and error.reason is Reason.FIELD_INVALID


def parallel(plan: Plan, limits: Limits) -> int:
    """Candidates of a request that are drawn at a time: what it takes up."""
    most = limits.parallel_candidates
    if plan.accept_reward is not None:
        most = min(most, max(plan.num_images, limits.parallel_with_accept))
    return min(plan.num_candidates, most)


def with_size(sampling: Sampling, models: Models, prefix: str) -> Sampling:
    """The sampling with the model's size where none was asked for. Raises RequestError for one that it cannot
    draw."""
    model = models.diffusion
    sized = Sampling(
        sampling.prompt,
        sampling.negative_prompt,
        sampling.steps,
        sampling.guidance_scale,
        sampling.scheduler,
        sampling.height or model.height,
        sampling.width or model.width,
    )
    validation.grid(sized, model.multiple, prefix)
    return sized


def sample_spec(digest: str, sampling: Sampling, seed: int, candidate: int) -> SampleSpec:
    return SampleSpec(
        model=digest,
        prompt=sampling.prompt,
        negative_prompt=sampling.negative_prompt,
        seed=candidate_seed(seed, candidate),
        steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        scheduler=sampling.scheduler,
        height=sampling.height,
        width=sampling.width,
    )


def ranked(candidates: Iterable[Candidate]) -> list[Candidate]:
    """By descending reward; equal ones in the order of their number."""
    return sorted(candidates, key=lambda candidate: (-candidate.reward, candidate.index))


def manifest(models: Models, sampling: Sampling, seed: int, candidate: int) -> pb.ImageManifest:
    return pb.ImageManifest(
        model_digest=models.diffusion.digest,
        reward_model_digest=models.reward.digest,
        prompt=sampling.prompt,
        negative_prompt=sampling.negative_prompt,
        seed=seed,
        candidate=candidate,
        steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        width=sampling.width,
        height=sampling.height,
        scheduler=validation.SCHEDULER_NUMBERS[sampling.scheduler],
        software_version=accord.__version__,
    )


def image_message(candidate: Candidate, mime_type: str, manifest: pb.ImageManifest, rank: int) -> pb.Image:
    height, width = candidate.pixels.shape[:2]
    return pb.Image(
        image_id=candidate.image_id,
        data=candidate.data,
        mime_type=mime_type,
        width=width,
        height=height,
        reward=candidate.reward,
        clip_similarity=candidate.similarity,
        rank=rank,
        candidate=candidate.index,
        manifest=manifest,
    )
