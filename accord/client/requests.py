"""The requests of the contract, made from Python's values."""

import secrets
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, get_args

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration

from accord.errors import ConfigError
from accord.v1 import generation_pb2, reward_pb2

SchedulerName: TypeAlias = Literal["ddim", "dpm_solver_multistep", "euler", "unipc"]
FormatName: TypeAlias = Literal["png", "jpeg", "webp"]
Pair: TypeAlias = tuple[bytes | str | Path, str]

# What one ScoreImages call may hold; more is sent in several.
MOST_PAIRS = 256
_MOST_BYTES = 48_000_000


class GenerationOptions(TypedDict, total=False):
    """How images are drawn. What is left out is the server's choice, but the seed: it is drawn here."""

    num_images: int
    """Images to return: 1 to 64."""
    candidates: int
    """Images to draw, of which the best `num_images` are returned: at most 256."""
    negative_prompt: str
    seed: int
    steps: int
    guidance_scale: float
    width: int
    height: int
    scheduler: SchedulerName
    image_format: FormatName
    model: str
    """Alias or digest."""
    reward_model: str
    accept_reward: float
    """Stop as soon as `num_images` candidates have this reward: 0 to 1."""
    time_budget_s: float
    """Stop after this, and return the best so far."""


_SAME_NAME = frozenset(
    "num_images negative_prompt steps guidance_scale width height model reward_model accept_reward".split()
)


def generation_spec(prompt: str, options: GenerationOptions) -> generation_pb2.GenerationSpec:
    """The spec for `prompt`.

    Raises:
        ConfigError: an option is unknown, or has a value that the contract does not have; it names both.
    """
    unknown = sorted(set(options) - set(GenerationOptions.__annotations__))
    if unknown:
        known = ", ".join(GenerationOptions.__annotations__)
        raise ConfigError(f"unknown option {unknown[0]!r}; options are: {known}")
    fields: dict[str, Any] = {
        name: value for name, value in options.items() if name in _SAME_NAME and value is not None
    }
    if (candidates := options.get("candidates")) is not None:
        fields["num_candidates"] = candidates
    # Drawn here, so that a retry draws the same images.
    seed = options.get("seed")
    fields["seed"] = secrets.randbits(63) if seed is None else seed
    if (scheduler := options.get("scheduler")) is not None:
        fields["scheduler"] = _enum("SCHEDULER", scheduler, get_args(SchedulerName))
    fields["image_format"] = image_format(options.get("image_format", "png"))
    if (budget_s := options.get("time_budget_s")) is not None:
        fields["time_budget"] = _duration(budget_s)
    spec = generation_pb2.GenerationSpec(prompt=prompt)
    for name, value in fields.items():
        try:
            spec.MergeFrom(generation_pb2.GenerationSpec(**{name: value}))
        except (TypeError, ValueError):
            option = "candidates" if name == "num_candidates" else name
            raise ConfigError(f"{option} is {value!r}; expected {_expected(spec, name)}") from None
    return spec


def _expected(spec: generation_pb2.GenerationSpec, name: str) -> str:
    """What a field of the contract can hold."""
    kind = spec.DESCRIPTOR.fields_by_name[name].cpp_type
    bits = {FieldDescriptor.CPPTYPE_UINT32: 32, FieldDescriptor.CPPTYPE_UINT64: 64}.get(kind)
    if bits is not None:
        return f"an integer from 0 to {2**bits - 1}"
    return "a text" if kind == FieldDescriptor.CPPTYPE_STRING else "a number"


def image_format(name: str) -> Any:
    """The contract's number of an image format.

    Raises:
        ConfigError: there is no such format.
    """
    return _enum("IMAGE_FORMAT", name, get_args(FormatName))


def score_requests(
    pairs: Iterable[Pair], reward_model: str, request_id: str
) -> Iterator[reward_pb2.ScoreImagesRequest]:
    """Requests for all pairs, in their order, each of a size that a server takes.

    Raises:
        ConfigError: an image's file cannot be read.
    """
    request = reward_pb2.ScoreImagesRequest(request_id=request_id, reward_model=reward_model)
    size = 0
    for image, prompt in pairs:
        data = _image_bytes(image)
        if len(request.pairs) == MOST_PAIRS or (request.pairs and size + len(data) > _MOST_BYTES):
            yield request
            request = reward_pb2.ScoreImagesRequest(request_id=request_id, reward_model=reward_model)
            size = 0
        request.pairs.add(image=data, prompt=prompt)
        size += len(data)
    if request.pairs:
        yield request


def new_request_id() -> str:
    """A name for a request, which the server's log has too."""
    return uuid.uuid4().hex


def _image_bytes(image: bytes | str | Path) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the image {image}: {error.strerror}") from None


def _enum(prefix: str, name: str, known: tuple[str, ...]) -> Any:
    if name not in known:
        raise ConfigError(
            f"unknown {prefix.lower().replace('_', ' ')} {name!r}; known are: {', '.join(known)}"
        )
    return (
        generation_pb2.DESCRIPTOR.enum_types_by_name["Scheduler" if prefix == "SCHEDULER" else "ImageFormat"]
        .values_by_name[f"{prefix}_{name.upper()}"]
        .number
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    try:
        duration.FromNanoseconds(round(seconds * 1e9))
    except (ValueError, OverflowError):
        raise ConfigError(f"{seconds} is no number of seconds that can be sent") from None
    return duration
