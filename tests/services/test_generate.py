"""Images over gRPC, with plain generated stubs and a real port."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.protobuf import json_format
from PIL import Image

from accord.images import decode_image
from accord.v1 import generation_pb2 as pb
from accord.v1 import reward_pb2
from tests.services.deployment import PROMPT, Deployment, eventually, reason, same_pixels

pytestmark = pytest.mark.cluster


def test_models_are_told(deployment: Deployment) -> None:
    answer = deployment.generation.ListModels(pb.ListModelsRequest(), metadata=deployment.metadata())
    models = {model.alias: model for model in answer.models}
    assert set(models) == {"base", "learned", "clip"}
    assert models["base"].kind == pb.MODEL_KIND_DIFFUSION
    assert models["learned"].kind == pb.MODEL_KIND_REWARD
    assert [model.is_default for model in models.values()] == [True, True, False]
    assert all(len(model.digest) == 64 for model in models.values())


def test_best_of_n_returns_the_highest_rewards_in_order(deployment: Deployment) -> None:
    everything = deployment.generate(seed=1, num_images=8)
    rewards = [image.reward for image in everything.images]
    assert rewards == sorted(rewards, reverse=True)
    assert len(set(rewards)) > 1
    assert [image.rank for image in everything.images] == list(range(1, 9))
    assert sorted(image.candidate for image in everything.images) == list(range(8))
    best = deployment.generate(seed=1, num_images=2, num_candidates=8)
    assert [image.candidate for image in best.images] == [image.candidate for image in everything.images[:2]]
    for image, other in zip(best.images, everything.images, strict=False):
        assert same_pixels(image, other)
    assert best.summary.candidates_done == 8
    assert best.summary.finish_reason == pb.FINISH_REASON_COMPLETED
    assert len({image.image_id for image in [*everything.images, *best.images]}) == 10


def test_rewards_are_those_that_scoring_gives(deployment: Deployment) -> None:
    made = deployment.generate(seed=2, num_images=3)
    pairs = [reward_pb2.ImagePrompt(image=image.data, prompt=PROMPT) for image in made.images]
    pairs.append(reward_pb2.ImagePrompt(image=made.images[0].data, prompt="something of no grammar"))
    scored = deployment.reward.ScoreImages(
        reward_pb2.ScoreImagesRequest(request_id="mine-1", pairs=pairs),
        metadata=deployment.metadata("scores"),
    )
    assert scored.request_id == "mine-1"
    assert scored.reward_model_digest == made.summary.reward_model_digest
    for score, image in zip(scored.scores, made.images, strict=False):
        assert score.reward == pytest.approx(image.reward, abs=1e-4)
        assert score.clip_similarity == pytest.approx(image.clip_similarity, abs=1e-4)
        assert 0 < score.prompt_probability < 1
    assert not scored.scores[3].HasField("prompt_probability")


def test_an_image_depends_on_its_seed_alone(deployment: Deployment) -> None:
    alone = deployment.generate(seed=7)
    with ThreadPoolExecutor(6) as pool:  # now in batches with others, of other lengths
        others = [pool.submit(deployment.generate, seed=100 + n, steps=5 + n, num_images=2) for n in range(4)]
        again = pool.submit(deployment.generate, seed=7, num_images=3).result()
        for other in others:
            other.result()
    first = next(image for image in again.images if image.candidate == 0)
    assert same_pixels(first, alone.images[0])
    assert not same_pixels(deployment.generate(seed=8).images[0], alone.images[0])


def test_without_a_seed_the_server_draws_one_and_tells_it(deployment: Deployment) -> None:
    first, second = deployment.generate(), deployment.generate()
    assert first.summary.seed != second.summary.seed
    assert same_pixels(deployment.generate(seed=first.summary.seed).images[0], first.images[0])


def test_the_png_holds_the_manifest_and_replay_makes_it_again(deployment: Deployment) -> None:
    made = deployment.generate(seed=3, num_images=2, guidance_scale=2.7, negative_prompt="blue")
    for image in made.images:
        with Image.open(io.BytesIO(image.data)) as png:
            text = png.text["accord"]  # type: ignore[attr-defined]
        manifest = json_format.Parse(text, pb.ImageManifest())
        assert manifest == image.manifest
        again = deployment.generation.ReplayImage(
            pb.ReplayImageRequest(manifest=manifest), metadata=deployment.metadata()
        ).image
        assert same_pixels(again, image)
        assert again.reward == pytest.approx(image.reward, abs=1e-4)
        assert again.manifest == manifest


def test_replay_of_a_model_that_is_gone(deployment: Deployment) -> None:
    manifest = deployment.generate(seed=3).images[0].manifest
    manifest.model_digest = "0" * 64
    with pytest.raises(grpc.RpcError) as caught:
        deployment.generation.ReplayImage(
            pb.ReplayImageRequest(manifest=manifest), metadata=deployment.metadata()
        )
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert reason(caught.value) == "MODEL_NOT_FOUND"


@pytest.mark.parametrize(
    ("image_format", "mime_type", "kind"),
    [(pb.IMAGE_FORMAT_JPEG, "image/jpeg", "JPEG"), (pb.IMAGE_FORMAT_WEBP, "image/webp", "WEBP")],
)
def test_formats(deployment: Deployment, image_format: int, mime_type: str, kind: str) -> None:
    image = deployment.generate(seed=3, image_format=image_format).images[0]
    assert image.mime_type == mime_type
    with Image.open(io.BytesIO(image.data)) as opened:
        assert opened.format == kind
        assert opened.size == (image.width, image.height)


@pytest.mark.parametrize("scheduler", pb.Scheduler.values()[1:])
def test_schedulers(deployment: Deployment, scheduler: int) -> None:
    image = deployment.generate(seed=3, steps=5, scheduler=scheduler).images[0]
    assert image.manifest.scheduler == scheduler
    assert decode_image(image.data).std() > 5


def test_stream_tells_what_happens_in_order(deployment: Deployment) -> None:
    events = list(deployment.stream(seed=1, num_images=2, num_candidates=6, steps=40))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "accepted"
    assert kinds[-1] == "completed"
    assert kinds.count("accepted") == kinds.count("completed") == 1
    assert kinds.count("image") == 6
    steps = [event.progress.steps_done for event in events if event.HasField("progress")]
    assert steps == sorted(steps)
    assert steps[-1] == 6 * 40 == next(e for e in events if e.HasField("progress")).progress.steps_total
    images = {event.image.image_id: event.image for event in events if event.HasField("image")}
    best = sorted(images.values(), key=lambda image: -image.reward)[:2]
    ranking = events[-1].completed.ranking
    assert [one.image_id for one in ranking] == [image.image_id for image in best]
    assert [one.rank for one in ranking] == [1, 2]
    assert {image.manifest.model_digest for image in images.values()} == {events[0].accepted.model_digest}
    assert events[0].accepted.request_id == events[-1].completed.request_id


def test_accept_reward_stops_early(deployment: Deployment) -> None:
    answer = deployment.generate(seed=1, num_images=2, num_candidates=64, accept_reward=0.0)
    assert answer.summary.finish_reason == pb.FINISH_REASON_ACCEPTED
    assert 2 <= answer.summary.candidates_done < 64
    assert len(answer.images) == 2
    out_of_reach = deployment.generate(seed=1, num_images=1, num_candidates=4, accept_reward=1.0)
    assert out_of_reach.summary.finish_reason == pb.FINISH_REASON_COMPLETED
    assert out_of_reach.summary.candidates_done == 4


def test_time_budget_returns_the_best_so_far(deployment: Deployment) -> None:
    for seconds in (2, 8, 32):  # a slow machine has nothing to show after the first
        try:
            answer = deployment.generate(
                seed=1, num_candidates=256, steps=10 * seconds, time_budget={"seconds": seconds}
            )
            break
        except grpc.RpcError as error:
            if reason(error) != "TIME_BUDGET_SPENT":
                raise
    assert answer.summary.finish_reason == pb.FINISH_REASON_TIME_BUDGET
    assert 1 <= answer.summary.candidates_done < 256
    assert len(answer.images) == 1
    _idle(deployment)


def test_time_budget_that_is_too_short(deployment: Deployment) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        deployment.generate(seed=1, num_candidates=16, steps=150, time_budget={"nanos": 20_000_000})
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert reason(caught.value) == "TIME_BUDGET_SPENT"


@pytest.mark.parametrize("how", ["stream", "unary", "deadline"])
def test_cancelling_frees_the_engine(deployment: Deployment, how: str) -> None:
    _idle(deployment)
    before = deployment.ask("engine")
    spec = {"seed": 1, "num_candidates": 16, "steps": 150}
    if how == "stream":
        events = deployment.stream(**spec)
        while not next(events).HasField("progress"):
            pass
        events.cancel()
    elif how == "unary":
        request = pb.GenerateImagesRequest(spec=pb.GenerationSpec(prompt=PROMPT, **spec))
        call = deployment.generation.GenerateImages.future(request, metadata=deployment.metadata())
        eventually(lambda: deployment.ask("engine")["in_flight"], "the request is being drawn")
        call.cancel()
    else:
        with pytest.raises(grpc.RpcError) as caught:
            deployment.generate(timeout=1.0, **spec)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    _idle(deployment)
    after = deployment.ask("engine")
    assert after["sample_steps"] - before["sample_steps"] < 16 * 150
    assert after["failed"] == before["failed"]
    assert deployment.ask("engine")["sample_steps"] == after["sample_steps"]
    assert deployment.generate(seed=1).images


def _idle(deployment: Deployment) -> None:
    def idle() -> bool:
        stats = deployment.ask("engine")
        return stats["in_flight"] == stats["queued"] == 0 and deployment.ask("in_use")["candidates"] == 0

    eventually(idle, "the engine's slots and the limiter's leases are free again")
