"""Requests as they must be: every wrong field is told, at most 16 of them. Pure, without Ray."""

from __future__ import annotations

import math
import re
import secrets
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message

from accord.errors import ImageError
from accord.images import Pixels, decode_image
from accord.v1 import generation_pb2 as pb
from accord.v1 import reward_pb2
from services.config import Limits, SamplerDefaults
from services.gateway.errors import Reason, RequestError, Violation, invalid

M = TypeVar("M", bound=Message)

MAX_PROMPT = 1000
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_MODEL_NAME = re.compile(r"[A-Za-z0-9._:/@-]{1,128}")
SCHEDULERS: dict[int, str] = {
    pb.SCHEDULER_DDIM: "DDIMScheduler",
    pb.SCHEDULER_DPM_SOLVER_MULTISTEP: "DPMSolverMultistepScheduler",
    pb.SCHEDULER_EULER: "EulerDiscreteScheduler",
    pb.SCHEDULER_UNIPC: "UniPCMultistepScheduler",
}
SCHEDULER_NUMBERS: dict[str, Any] = {name: number for number, name in SCHEDULERS.items()}
MIME_TYPES: dict[int, str] = {
    pb.IMAGE_FORMAT_UNSPECIFIED: "image/png",
    pb.IMAGE_FORMAT_PNG: "image/png",
    pb.IMAGE_FORMAT_JPEG: "image/jpeg",
    pb.IMAGE_FORMAT_WEBP: "image/webp",
}


@dataclass(frozen=True)
class Sampling:
    """How one sample is drawn; height and width in pixels, 0 for the model's own."""

    prompt: str
    negative_prompt: str
    steps: int
    guidance_scale: float
    scheduler: str
    height: int
    width: int


@dataclass(frozen=True)
class Plan:
    """A checked request for images."""

    sampling: Sampling
    num_images: int
    num_candidates: int
    seed: int
    mime_type: str
    model: str
    reward_model: str
    accept_reward: float | None
    time_budget_s: float | None


def parse(message_type: type[M], data: bytes, limits: Limits) -> M:
    """The message that `data` encodes. Raises RequestError for bytes that are none, or too many."""
    if len(data) > limits.max_request_bytes:
        raise RequestError(
            Reason.REQUEST_MALFORMED,
            f"the request has {len(data)} bytes; at most {limits.max_request_bytes} are allowed",
        )
    try:
        return message_type.FromString(data)
    except DecodeError:
        name = message_type.DESCRIPTOR.full_name
        raise RequestError(
            Reason.REQUEST_MALFORMED, f"the bytes are no {name}; check the stubs' version"
        ) from None


def request_id(given: str) -> str:
    """The request's id: the client's, or a new one. Raises RequestError for an id that it cannot be."""
    if not given:
        return secrets.token_hex(8)
    if not _REQUEST_ID.fullmatch(given):
        raise invalid([Violation("request_id", "expected at most 128 letters, digits and ._:-")])
    return given


def plan(spec: pb.GenerationSpec, limits: Limits, defaults: SamplerDefaults) -> Plan:
    """The checked form of a spec. Raises RequestError that names every wrong field."""
    wrong: list[Violation] = []
    _prompt(wrong, "spec.prompt", spec.prompt)
    if len(spec.negative_prompt) > MAX_PROMPT:
        wrong.append(Violation("spec.negative_prompt", f"expected at most {MAX_PROMPT} characters"))
    num_images = spec.num_images or 1
    if num_images > limits.max_images:
        wrong.append(Violation("spec.num_images", f"expected 1 to {limits.max_images}, got {num_images}"))
    candidates = spec.num_candidates or num_images
    if not num_images <= candidates <= limits.max_candidates:
        expected = f"expected num_images ({num_images}) to {limits.max_candidates}, got {candidates}"
        wrong.append(Violation("spec.num_candidates", expected))
    guidance = spec.guidance_scale if spec.HasField("guidance_scale") else defaults.guidance_scale
    sampling = Sampling(
        prompt=spec.prompt,
        negative_prompt=spec.negative_prompt,
        steps=spec.steps or defaults.steps,
        guidance_scale=float(np.float32(guidance)),  # as the manifest will have it
        scheduler=_scheduler(wrong, "spec", spec.scheduler, defaults.scheduler),
        height=spec.height,
        width=spec.width,
    )
    _sampler(wrong, "spec", sampling, limits)
    _names(wrong, {"spec.model": spec.model, "spec.reward_model": spec.reward_model})
    mime_type = _mime_type(wrong, "spec.image_format", spec.image_format)
    accept = spec.accept_reward if spec.HasField("accept_reward") else None
    if accept is not None and not 0.0 <= accept <= 1.0:
        wrong.append(Violation("spec.accept_reward", "expected a number from 0 to 1"))
    budget = _budget(wrong, spec)
    if wrong:
        raise invalid(wrong)
    seed = spec.seed if spec.HasField("seed") else secrets.randbits(63)
    return Plan(
        sampling, num_images, candidates, seed, mime_type, spec.model, spec.reward_model, accept, budget
    )


def replay(request: pb.ReplayImageRequest, limits: Limits) -> tuple[Sampling, str]:
    """How to draw a manifest's image again, and the MIME type. Raises RequestError."""
    wrong: list[Violation] = []
    if not request.HasField("manifest"):
        raise invalid([Violation("manifest", "expected the manifest of an image, got none")])
    manifest = request.manifest
    _prompt(wrong, "manifest.prompt", manifest.prompt)
    if len(manifest.negative_prompt) > MAX_PROMPT:
        wrong.append(Violation("manifest.negative_prompt", f"expected at most {MAX_PROMPT} characters"))
    for name in ("model_digest", "steps", "width", "height"):
        if not getattr(manifest, name):
            wrong.append(
                Violation(f"manifest.{name}", "expected the value of the image's manifest, got none")
            )
    if manifest.scheduler not in SCHEDULERS:
        wrong.append(Violation("manifest.scheduler", "expected a scheduler of the image's manifest"))
    if manifest.candidate >= limits.max_candidates:
        wrong.append(Violation("manifest.candidate", f"expected less than {limits.max_candidates}"))
    sampling = Sampling(
        prompt=manifest.prompt,
        negative_prompt=manifest.negative_prompt,
        steps=manifest.steps or 1,
        guidance_scale=manifest.guidance_scale,
        scheduler=SCHEDULERS.get(manifest.scheduler, ""),
        height=manifest.height,
        width=manifest.width,
    )
    _sampler(wrong, "manifest", sampling, limits)
    _names(
        wrong,
        {
            "manifest.model_digest": manifest.model_digest,
            "manifest.reward_model_digest": manifest.reward_model_digest,
        },
    )
    mime_type = _mime_type(wrong, "image_format", request.image_format)
    if wrong:
        raise invalid(wrong)
    return sampling, mime_type


def grid(sampling: Sampling, multiple: int, prefix: str) -> None:
    """Raises RequestError for a size that is no multiple of the model's grid, in pixels."""
    wrong = [
        Violation(f"{prefix}.{name}", f"expected a multiple of {multiple} pixels, got {value}")
        for name, value in (("height", sampling.height), ("width", sampling.width))
        if value % multiple
    ]
    if wrong:
        raise invalid(wrong)


def pairs(request: reward_pb2.ScoreImagesRequest, limits: Limits) -> None:
    """Checks all of a request for scores but its images. Raises RequestError."""
    wrong: list[Violation] = []
    if not 1 <= len(request.pairs) <= limits.max_pairs:
        wrong.append(Violation("pairs", f"expected 1 to {limits.max_pairs}, got {len(request.pairs)}"))
    _names(wrong, {"reward_model": request.reward_model})
    for index, pair in enumerate(request.pairs[: limits.max_pairs]):
        _prompt(wrong, f"pairs[{index}].prompt", pair.prompt)
        if not pair.image:
            wrong.append(Violation(f"pairs[{index}].image", "expected a PNG, JPEG or WebP, got nothing"))
    if wrong:
        raise invalid(wrong)


def images(request: reward_pb2.ScoreImagesRequest, limits: Limits) -> list[Pixels]:
    """The pixels (HWC) of all pairs. Takes long: run it in a thread. Raises RequestError that names the bad
    ones."""
    decoded: list[Pixels] = []
    wrong: list[Violation] = []
    pixels = 0
    for index, pair in enumerate(request.pairs):
        if len(wrong) == MAX_BAD_IMAGES or pixels > PIXELS_IN_ALL * limits.max_image_pixels:
            break
        try:
            image = decode_image(
                pair.image, max_bytes=limits.max_image_bytes, max_pixels=limits.max_image_pixels
            )
        except ImageError as error:
            wrong.append(Violation(f"pairs[{index}].image", str(error)))
            continue
        except MemoryError:
            wrong.append(Violation(f"pairs[{index}].image", "too large to be decoded"))
            continue
        pixels += image.shape[0] * image.shape[1]
        decoded.append(image)
    if pixels > PIXELS_IN_ALL * limits.max_image_pixels:
        expected = f"expected at most {PIXELS_IN_ALL * limits.max_image_pixels} pixels over all images"
        wrong.append(Violation("pairs", expected))
    if wrong:
        raise invalid(wrong, Reason.IMAGE_INVALID)
    return decoded


PIXELS_IN_ALL = 8
"""The images of one request may have so many times the pixels that one may have."""
MAX_BAD_IMAGES = 16
"""After so many bad images the rest are not looked at."""


def _prompt(wrong: list[Violation], name: str, text: str) -> None:
    if not text.strip():
        wrong.append(Violation(name, "expected a description of the image, got nothing"))
    elif len(text) > MAX_PROMPT:
        wrong.append(Violation(name, f"expected at most {MAX_PROMPT} characters, got {len(text)}"))


def _names(wrong: list[Violation], names: dict[str, str]) -> None:
    for field, value in names.items():
        if value and not _MODEL_NAME.fullmatch(value):
            wrong.append(Violation(field, "expected an alias or a digest of a model"))


def _scheduler(wrong: list[Violation], prefix: str, number: int, default: str) -> str:
    if number == pb.SCHEDULER_UNSPECIFIED:
        return default
    if number not in SCHEDULERS:
        wrong.append(Violation(f"{prefix}.scheduler", f"there is no scheduler {number}"))
    return SCHEDULERS.get(number, default)


def _mime_type(wrong: list[Violation], field: str, number: int) -> str:
    if number not in MIME_TYPES:
        wrong.append(Violation(field, f"there is no image format {number}"))
    return MIME_TYPES.get(number, "image/png")


def _sampler(wrong: list[Violation], prefix: str, sampling: Sampling, limits: Limits) -> None:
    if not 1 <= sampling.steps <= limits.max_steps:
        wrong.append(Violation(f"{prefix}.steps", f"expected 1 to {limits.max_steps}, got {sampling.steps}"))
    if not (math.isfinite(sampling.guidance_scale) and 0.0 <= sampling.guidance_scale <= 30.0):
        wrong.append(Violation(f"{prefix}.guidance_scale", "expected a number from 0 to 30"))
    for name, value in (("width", sampling.width), ("height", sampling.height)):
        if value > limits.max_side_pixels:
            expected = f"expected at most {limits.max_side_pixels} pixels, got {value}"
            wrong.append(Violation(f"{prefix}.{name}", expected))


def _budget(wrong: list[Violation], spec: pb.GenerationSpec) -> float | None:
    if not spec.HasField("time_budget"):
        return None
    seconds: float = spec.time_budget.seconds + spec.time_budget.nanos / 1e9
    if not 0.01 <= seconds <= 3600.0:
        wrong.append(Violation("spec.time_budget", "expected 0.01 s to 1 h"))
    return seconds
