"""What calls give back, and manifests as JSON and in PNGs."""

import dataclasses
import datetime
import io
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf import json_format

from accord.artifacts import write_file
from accord.errors import ImageError
from accord.v1 import generation_pb2, reward_pb2

if TYPE_CHECKING:
    from accord.images import Pixels

MANIFEST_KEY = "accord"
"""Of the text in a PNG that holds its manifest."""


@dataclasses.dataclass(frozen=True, slots=True)
class Accepted:
    """The first event of a stream: what the server is about to do."""

    request_id: str
    seed: int
    num_candidates: int
    model_digest: str
    reward_model_digest: str


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """How far a request is, in denoising steps over all candidates, and in candidates."""

    steps_done: int
    steps_total: int
    candidates_done: int
    candidates_total: int

    @property
    def fraction(self) -> float:
        """0 to 1."""
        return self.steps_done / self.steps_total if self.steps_total else 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class GeneratedImage:
    """An image and what is known of it. `rank` is from 1, by descending reward; 0 while it is not known."""

    image_id: str
    data: bytes = dataclasses.field(repr=False)
    mime_type: str
    width: int
    height: int
    reward: float
    clip_similarity: float
    rank: int
    candidate: int
    manifest: generation_pb2.ImageManifest = dataclasses.field(repr=False)

    @property
    def suffix(self) -> str:
        """Of a file that holds it: .png, .jpg or .webp."""
        return {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}.get(self.mime_type, "")

    def pixels(self) -> "Pixels":
        """Uint8 RGB, of shape (height, width, 3)."""
        from accord.images import decode_image

        return decode_image(self.data, max_bytes=float("inf"))

    def save(self, path: str | Path) -> Path:
        """Write the file as it came, all or nothing. Returns its path."""
        write_file(path, self.data, durable=False)
        return Path(path)


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """How a request ended. `finish_reason` is completed, accepted or time_budget."""

    finish_reason: str
    candidates_done: int
    seed: int
    model_digest: str
    reward_model_digest: str
    elapsed_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
    """The images that were asked for, best first."""

    request_id: str
    images: tuple[GeneratedImage, ...]
    summary: Summary

    @property
    def best(self) -> GeneratedImage:
        """The image with the highest reward."""
        return self.images[0]


Event = Accepted | Progress | GeneratedImage | Generation


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """What the reward model says of one image and prompt.

    `prompt_probability` is None when the prompt is none of the model's grammar.
    """

    reward: float
    clip_similarity: float
    prompt_probability: float | None
    reward_model_digest: str


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """A model that the server has loaded. `kind` is diffusion or reward."""

    kind: str
    alias: str
    digest: str
    is_default: bool
    load_time: datetime.datetime


def manifest_json(manifest: generation_pb2.ImageManifest) -> str:
    """The manifest as JSON (protobuf's mapping: 64-bit numbers are strings), to be kept beside an image."""
    return json_format.MessageToJson(manifest, preserving_proto_field_name=True, sort_keys=True) + "\n"


def manifest_from_json(text: str) -> generation_pb2.ImageManifest:
    """The manifest that `manifest_json` wrote, or that lies in a PNG.

    Raises:
        ImageError: it is no manifest.
    """
    try:
        manifest = json_format.Parse(text, generation_pb2.ImageManifest(), ignore_unknown_fields=True)
    except (json_format.ParseError, RecursionError) as error:
        raise ImageError(f"this is no manifest of an image: {str(error).splitlines()[0]:.200}") from None
    if not manifest.model_digest or not manifest.prompt:
        raise ImageError("this is no manifest of an image: it names no model_digest and prompt")
    return manifest


def manifest_from_png(data: bytes) -> generation_pb2.ImageManifest:
    """The manifest that the server put into a PNG.

    Raises:
        ImageError: no PNG, or none of Accord's (an editor may have dropped the text).
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.load()  # texts may stand behind the pixels
            text = image.info.get(MANIFEST_KEY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise ImageError("this is no readable PNG: only PNGs carry their manifest") from None
    if not isinstance(text, str):
        raise ImageError("this PNG carries no manifest: it is not from Accord, or its texts were dropped")
    return manifest_from_json(text)


def read_image(image: generation_pb2.Image) -> GeneratedImage:
    """An image of the contract."""
    return GeneratedImage(
        image_id=image.image_id,
        data=image.data,
        mime_type=image.mime_type,
        width=image.width,
        height=image.height,
        reward=image.reward,
        clip_similarity=image.clip_similarity,
        rank=image.rank,
        candidate=image.candidate,
        manifest=image.manifest,
    )


def read_summary(summary: generation_pb2.GenerationSummary) -> Summary:
    """A summary of the contract."""
    reason = generation_pb2.FinishReason.Name(summary.finish_reason).removeprefix("FINISH_REASON_").lower()
    return Summary(
        finish_reason=reason,
        candidates_done=summary.candidates_done,
        seed=summary.seed,
        model_digest=summary.model_digest,
        reward_model_digest=summary.reward_model_digest,
        elapsed_s=summary.elapsed.ToTimedelta().total_seconds(),
    )


def read_generation(response: generation_pb2.GenerateImagesResponse) -> Generation:
    """The answer of GenerateImages."""
    images = tuple(read_image(image) for image in response.images)
    return Generation(response.request_id, images, read_summary(response.summary))


def read_scores(response: reward_pb2.ScoreImagesResponse) -> tuple[Score, ...]:
    """The answer of ScoreImages."""
    return tuple(
        Score(
            reward=score.reward,
            clip_similarity=score.clip_similarity,
            prompt_probability=score.prompt_probability if score.HasField("prompt_probability") else None,
            reward_model_digest=response.reward_model_digest,
        )
        for score in response.scores
    )


def read_models(response: generation_pb2.ListModelsResponse) -> tuple[Model, ...]:
    """The answer of ListModels."""
    return tuple(
        Model(
            kind=generation_pb2.ModelKind.Name(model.kind).removeprefix("MODEL_KIND_").lower(),
            alias=model.alias,
            digest=model.digest,
            is_default=model.is_default,
            load_time=model.load_time.ToDatetime(datetime.UTC),
        )
        for model in response.models
    )


class StreamReader:
    """Turns the messages of StreamImages into events, over all attempts of one call.

    What a retry says again is not said again: images that the caller has had, and `Accepted`. Images of
    another model are others, and so are said.
    """

    def __init__(self) -> None:
        self._accepted = False
        self._known: set[tuple[str, int]] = set()
        self._images: dict[str, generation_pb2.Image] = {}
        self.completed = False

    def restart(self) -> None:
        """A new attempt begins."""
        self._images.clear()

    def event(self, message: generation_pb2.StreamImagesResponse) -> Event | None:
        """The event that the message is for the caller, if any."""
        match message.WhichOneof("event"):
            case "accepted":
                return self._read_accepted(message.accepted)
            case "progress":
                told = message.progress
                return Progress(
                    told.steps_done, told.steps_total, told.candidates_done, told.candidates_total
                )
            case "image":
                return self._read_image(message.image)
            case "completed":
                return self._read_completed(message.completed)
        return None  # an event that a newer server tells

    def _read_accepted(self, accepted: generation_pb2.Accepted) -> Accepted | None:
        if self._accepted:
            return None
        self._accepted = True
        return Accepted(
            accepted.request_id,
            accepted.seed,
            accepted.num_candidates,
            accepted.model_digest,
            accepted.reward_model_digest,
        )

    def _read_image(self, image: generation_pb2.Image) -> GeneratedImage | None:
        self._images[image.image_id] = image
        key = (image.manifest.model_digest, image.candidate)
        if key in self._known:
            return None
        self._known.add(key)
        return read_image(image)

    def _read_completed(self, completed: generation_pb2.Completed) -> Generation | None:
        images = []
        for place in sorted(completed.ranking, key=lambda place: place.rank):
            image = self._images.get(place.image_id)
            if image is None:  # the stream lost an image: not complete
                return None
            images.append(dataclasses.replace(read_image(image), rank=place.rank, reward=place.reward))
        self.completed = True
        return Generation(completed.request_id, tuple(images), read_summary(completed.summary))
