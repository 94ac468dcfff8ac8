"""Diffusion-KTO and Diffusion-DPO: by hand, and as the fine-tuner trains them."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from accord.diffusion.batches import Batches
from accord.diffusion.finetune import FinetuneConfig, Finetuner
from accord.diffusion.model import DiffusionModel
from accord.diffusion.objectives import (
    diffusion_dpo,
    diffusion_kto,
    implicit_reward,
    kto_reference_point,
    preference_loss,
)
from accord.errors import ConfigError, FeedbackError
from tests.diffusion.tuning import LABELS, PAIRS, config, judged, make_data

OBJECTIVES = ("diffusion_kto", "diffusion_dpo")


def settings(objective: str, **changes: object) -> FinetuneConfig:
    small = {"objective": objective, "batch_size": 6, "kto_beta": 20.0, "dpo_beta": 20.0}
    return config(**(small | changes))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def constant(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 2, 4, 4)


def test_implicit_reward_by_hand() -> None:
    # |ref - target|^2 - |prediction - target|^2: 1 - 4, 9 - 0, 4 - 4
    reward_B = implicit_reward(constant(3.0, 5.0, -1.0), constant(1.0, 5.0, 1.0), constant(2.0, 2.0, 3.0))
    torch.testing.assert_close(reward_B, torch.tensor([-3.0, 9.0, 0.0]))


def test_dpo_by_hand() -> None:
    loss_P = diffusion_dpo(torch.tensor([0.25, -0.1, 0.0]), torch.tensor([-0.05, 0.3, 0.0]), 8.0)
    expected = [-math.log(sigmoid(4 * 0.3)), -math.log(sigmoid(4 * -0.4)), math.log(2)]
    torch.testing.assert_close(loss_P, torch.tensor(expected))
    # The paper's betas on a pair that is learned the wrong way round: the loss is linear, not infinite.
    torch.testing.assert_close(
        diffusion_dpo(torch.tensor([-1.0]), torch.tensor([1.0]), 5000.0), torch.tensor([5000.0])
    )


def test_kto_by_hand() -> None:
    reward_B, weight_B = torch.tensor([0.3, 0.3, -0.2, 0.1]), torch.tensor([1.0, -1.0, -2.0, 0.5])
    loss_B = diffusion_kto(reward_B, weight_B, torch.tensor(0.1), 5.0)
    expected = [1 - sigmoid(1.0), 1 - sigmoid(-1.0), 2 * (1 - sigmoid(1.5)), 0.5 * 0.5]
    torch.testing.assert_close(loss_B, torch.tensor(expected))


def test_the_reference_point_is_a_mean_and_never_negative() -> None:
    reward_sum = torch.tensor(3.0, requires_grad=True)
    point = kto_reference_point(reward_sum, 4)
    assert point == 0.75
    assert not point.requires_grad
    assert kto_reference_point(torch.tensor(-3.0), 4) == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_goes_towards_the_good_image_and_away_from_the_bad_one(objective: str) -> None:
    target, reference = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    prediction = reference.clone().requires_grad_(True)
    reward_B = implicit_reward(prediction, target, reference)
    weight_B = torch.tensor([1.0, -1.0])
    loss_B, metrics = preference_loss(settings(objective), reward_B, weight_B, torch.zeros(()))
    (gradient,) = torch.autograd.grad(loss_B.sum() / 2, prediction)
    towards = ((target - reference) * -gradient).sum(dim=(1, 2, 3))
    assert towards[0] > 0 > towards[1]
    # At the start it is as long as that of the denoising loss, whatever beta is, and for each image.
    reward_B = implicit_reward(prediction, target, reference)
    (plain,) = torch.autograd.grad(-(reward_B * weight_B).sum() / 2, prediction)
    torch.testing.assert_close(gradient, plain)
    assert float(metrics["preference_margin"]) == 0


def test_a_pair_shares_its_loss_and_metrics_count_images() -> None:
    reward_B = torch.tensor([0.3, 0.1, -0.2, 0.0])  # one pair as people said, one the other way round
    loss_B, metrics = preference_loss(settings("diffusion_dpo"), reward_B, torch.ones(4), None)
    expected = diffusion_dpo(reward_B[0::2], reward_B[1::2], 20.0) / 10
    torch.testing.assert_close(loss_B, expected.repeat_interleave(2))
    assert float(metrics["preference_margin"]) == pytest.approx(2 * (0.2 - 0.2), abs=1e-6)
    assert float(metrics["preference_accuracy"]) == 2
    weight_B = torch.tensor([1.0, -1.0, -1.0, 1.0])
    _, metrics = preference_loss(settings("diffusion_kto"), reward_B, weight_B, torch.tensor(0.05))
    assert float(metrics["preference_margin"]) == pytest.approx(0.25 - 0.05 + 0.25 - 0.05)
    assert float(metrics["preference_accuracy"]) == 2


def test_both_images_of_a_pair_get_the_same_noise(tiny_model: DiffusionModel) -> None:
    data = judged(tiny_model)
    tuner = Finetuner(tiny_model, data, settings("diffusion_dpo", condition_dropout=0.5), seed=1)
    alphas_T = tuner.batches.alphas_cumprod_T
    drawn, empty = set(), []
    for step in range(10):
        batch = tuner.batches.draw(step)
        assert batch.num_model == 6
        assert len(batch.timesteps_B) == 6 + 3
        for first in (0, 2, 4):
            assert torch.equal(batch.target_BCHW[first], batch.target_BCHW[first + 1])  # epsilon: the noise
            assert batch.timesteps_B[first] == batch.timesteps_B[first + 1]
            assert torch.equal(batch.text_BTD[first], batch.text_BTD[first + 1])
            empty.append(torch.equal(batch.text_BTD[first], data.empty_text_TD))
            alpha = alphas_T[batch.timesteps_B[first]]
            latents = (batch.noisy_BCHW - (1 - alpha).sqrt() * batch.target_BCHW)[
                first : first + 2
            ] / alpha.sqrt()
            distance = (latents[:, None] - data.latents_NCHW[None]).square().sum(dim=(2, 3, 4))
            drawn.add(tuple(distance.argmin(dim=1).tolist()))
    assert drawn == {(0, 3), (4, 1)}
    assert set(empty) == {True, False}


def test_kto_draws_good_images_at_the_stated_share(tiny_model: DiffusionModel) -> None:
    changes = {"batch_size": 400, "kto_good_share": 0.7, "kto_bad_weight": 1.5}
    tuner = Finetuner(tiny_model, judged(tiny_model), settings("diffusion_kto", **changes), seed=0)
    assert tuner.batches.weight_N.tolist() == [1.0, -1.5, 0.0, -0.75, 1.0, -1.5]
    weight_B = tuner.batches.draw(0).weight_B[:400]
    assert set(weight_B.tolist()) == {1.0, -1.5, -0.75}, "never the image that nobody decided on"
    assert (weight_B > 0).float().mean() == pytest.approx(0.7, abs=0.1)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("gradient_accumulation", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_number_of_workers_is_one(
    tiny_model: DiffusionModel, world_size: int, gradient_accumulation: int, objective: str
) -> None:
    data, changes = judged(tiny_model), {"kto_good_share": 0.95}
    whole = Finetuner(tiny_model, data, settings(objective, **changes), seed=5)
    for _ in range(4):
        whole.step()
    changes["gradient_accumulation"] = gradient_accumulation
    parts = [
        Finetuner(tiny_model, data, settings(objective, **changes), seed=5, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    sums = {}

    def remember(metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        sums.update(metrics)
        return metrics

    def recall(metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What an all-reduce would give of the batch's implicit rewards, before any gradient."""
        return {name: sums["reward"] if name == "reward" else value for name, value in metrics.items()}

    whole._over_workers = remember  # type: ignore[method-assign]
    expected = whole.backward()
    if objective == "diffusion_kto":
        assert sums["reward"] > 0, "else the reference point is 0, and its sum is not tested"
    for part in parts:
        part.unet.load_state_dict(whole.unet.state_dict())
        part.step_index = whole.step_index
        part._over_workers = recall  # type: ignore[method-assign]
    metrics = [part.backward() for part in parts]
    for name, value in expected.items():
        torch.testing.assert_close(sum(m[name] for m in metrics), value, rtol=1e-3, atol=1e-5)
    for i, parameter in enumerate(whole.parameters):
        # DistributedDataParallel averages
        average = torch.stack([part.parameters[i].grad for part in parts]).mean(0)  # type: ignore[misc]
        torch.testing.assert_close(average, parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_resumed_run_is_an_uninterrupted_one(
    tiny_model: DiffusionModel, tmp_path: Path, objective: str
) -> None:
    data = judged(tiny_model)
    through = Finetuner(tiny_model, data, settings(objective), seed=2)
    losses = [through.step()["loss"] for _ in range(4)]
    first = Finetuner(tiny_model, data, settings(objective), seed=2)
    for _ in range(2):
        first.step()
    first.save(tmp_path / "checkpoint")
    second = Finetuner(tiny_model, data, settings(objective), seed=2)
    second.load(tmp_path / "checkpoint")
    assert [second.step()["loss"] for _ in range(2)] == losses[2:]
    assert all(torch.equal(a, b) for a, b in zip(second.parameters, through.parameters, strict=True))
    other = replace(data, label_N=-LABELS, pair_Q2=PAIRS.flip(1))
    with pytest.raises(ConfigError, match=r"data \("):
        Finetuner(tiny_model, other, settings(objective), seed=2).load(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("objective", "parameters"),
    [("diffusion_kto", "full"), ("diffusion_dpo", "full"), ("diffusion_dpo", "lora")],
)
def test_training_widens_the_margin_of_good_images_over_bad_ones(
    tiny_model: DiffusionModel, objective: str, parameters: str
) -> None:
    data = judged(tiny_model)
    changes = {
        "batch_size": 16,
        "beta": 0.0,
        "ema_decay": 0.0,
        "condition_dropout": 0.0,
        "steps": 15,
        "kto_good_share": 0.5,
    }
    trained = {"parameters": parameters, "learning_rate": 1e-3 if parameters == "full" else 1e-2}
    tuner = Finetuner(tiny_model, data, settings(objective, **changes, **trained), seed=0)
    # The same pairs on noise that was not trained on: chosen and rejected images in turn.
    batch = Finetuner(
        tiny_model, data, settings("diffusion_dpo", **{**changes, "batch_size": 64}), seed=9
    ).batches.draw(0)
    inputs = batch.inputs(slice(None))

    def margin() -> float:
        with torch.no_grad():
            reward_B = implicit_reward(
                tuner._predict(tuner.unet, *inputs),
                batch.target_BCHW,
                tuner._predict(tiny_model.unet, *inputs),
            )
        return float((reward_B[0::2] - reward_B[1::2]).mean())

    assert margin() == pytest.approx(0, abs=1e-5)
    steps = [tuner.step() for _ in range(15)]
    assert margin() > 0
    first, last = steps[0], steps[-5:]
    assert float(first["preference_margin"]) == pytest.approx(0, abs=1e-6)
    assert sum(float(step["loss"]) for step in last) / 5 < float(first["loss"])
    assert sum(float(step["preference_margin"]) for step in last) / 5 > 0


@pytest.mark.parametrize(
    ("objective", "sizes", "even"),
    [("diffusion_dpo", (6, 3), False), ("diffusion_dpo", (8, 2), True), ("diffusion_kto", (5, 3), True)],
)
def test_workers_have_as_much_each_only_if_pairs_can_be_shared(
    tiny_model: DiffusionModel, objective: str, sizes: tuple[int, int], even: bool
) -> None:
    changes = dict(zip(("batch_size", "pretraining_batch_size"), sizes, strict=True))
    parts = [
        Batches(tiny_model, judged(tiny_model), settings(objective, **changes), 0, rank=rank, world_size=2)
        for rank in range(2)
    ]
    assert [part.are_shared_evenly for part in parts] == [even, even]
    counts = {len(part.draw(step).timesteps_B) for part in parts for step in range(2)}
    assert (len(counts) == 1) == even


def test_workers_with_an_image_less_ask_for_the_reference_point_at_the_same_time(
    tiny_model: DiffusionModel,
) -> None:
    """Of 3 images in 2 parts one worker has 2 parts, the other 1: both exchange rewards before they predict
    with gradients."""
    small = settings("diffusion_kto", batch_size=3, pretraining_batch_size=0, beta=0, gradient_accumulation=2)
    for rank in range(2):
        order: list[str] = []
        part = Finetuner(tiny_model, judged(tiny_model), small, seed=5, rank=rank, world_size=2)
        plain_over, plain_loss = part._over_workers, part._loss

        def over(metrics: Any, order: list[str] = order, plain: Any = plain_over) -> Any:
            order.append("exchange")
            return plain(metrics)

        def loss(*arguments: Any, order: list[str] = order, plain: Any = plain_loss) -> Any:
            order.append("loss")
            return plain(*arguments)

        part._over_workers, part._loss = over, loss  # type: ignore[method-assign]
        part.backward()
        assert order == ["exchange", *["loss"] * (2 - rank), "exchange"]


def test_what_is_missing_is_said(tiny_model: DiffusionModel) -> None:
    data = judged(tiny_model)
    with pytest.raises(FeedbackError, match="of 6 there are 2 good and 0 bad ones"):
        Finetuner(tiny_model, replace(data, label_N=LABELS.clamp_min(0)), settings("diffusion_kto"), seed=0)
    with pytest.raises(ConfigError, match="expected one label of 6 images"):
        Finetuner(tiny_model, make_data(tiny_model), settings("diffusion_kto"), seed=0)
    with pytest.raises(FeedbackError, match="collect more images of each prompt, or comparisons"):
        Finetuner(tiny_model, make_data(tiny_model), settings("diffusion_dpo"), seed=0)
    with pytest.raises(ConfigError, match="images of different prompts"):
        Finetuner(
            tiny_model, replace(data, pair_Q2=torch.tensor([[0, 1]])), settings("diffusion_dpo"), seed=0
        )
    with pytest.raises(ConfigError, match="places of the 6 images"):
        Finetuner(
            tiny_model, replace(data, pair_Q2=torch.tensor([[0, 6]])), settings("diffusion_dpo"), seed=0
        )
    with pytest.raises(ValueError, match="batch_size must be even; it is 5"):
        settings("diffusion_dpo", batch_size=5)
    with pytest.raises(ConfigError, match=r"a batch of 1 \+ 1 images is too small for 3 workers"):
        small = settings("diffusion_dpo", batch_size=2, pretraining_batch_size=1)
        Finetuner(tiny_model, data, small, seed=0, world_size=3)
