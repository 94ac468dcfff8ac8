"""The losses against numbers worked out by hand."""

import math

import pytest
import torch

from accord.reward.losses import prompt_classification_loss, prompt_probabilities, reward_loss, reward_mse


def test_mse_is_the_weighted_mean_of_squared_errors() -> None:
    reward_B = torch.tensor([0.8, 0.4, 0.5])
    label_B = torch.tensor([1.0, 0.0, 1.0])
    weight_B = torch.tensor([1.0, 2.0, 0.0])
    # (1 * 0.2^2 + 2 * 0.4^2 + 0 * 0.5^2) / (1 + 2 + 0) = (0.04 + 0.32) / 3
    assert reward_mse(reward_B, label_B, weight_B).item() == pytest.approx(0.12)


def test_mse_of_no_weight_is_zero_not_nan() -> None:
    assert reward_mse(torch.tensor([0.3]), torch.tensor([1.0]), torch.tensor([0.0])).item() == 0.0


def test_equation_1_is_a_softmax_of_reward_over_temperature() -> None:
    # r / T = (1, 0, 0.5) / 2
    terms = [math.exp(0.5), math.exp(0.0), math.exp(0.25)]
    probability_BN = prompt_probabilities(torch.tensor([[1.0, 0.0, 0.5]]), temperature=2.0)
    assert probability_BN[0].tolist() == pytest.approx([term / sum(terms) for term in terms])


def test_classification_loss_is_the_cross_entropy_of_the_true_prompt() -> None:
    reward_GN = torch.tensor([[1.0, 0.0], [0.2, 0.6]])
    # -log(e^(1/2) / (e^(1/2) + e^0)) = log(1 + e^(-1/2)), and log(1 + e^((0.6 - 0.2) / 2))
    first, second = math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(0.2))
    assert prompt_classification_loss(reward_GN, 2.0).item() == pytest.approx((first + second) / 2)
    weighted = prompt_classification_loss(reward_GN, 2.0, torch.tensor([3.0, 1.0]))
    assert weighted.item() == pytest.approx((3 * first + second) / 4)


def test_classification_loss_of_equal_rewards_is_log_n() -> None:
    assert prompt_classification_loss(torch.full((4, 10), 0.7), 2.0).item() == pytest.approx(math.log(10))


def test_classification_loss_of_no_good_image_is_zero() -> None:
    assert prompt_classification_loss(torch.zeros(0, 3), 2.0).item() == 0.0


def test_total_is_mse_plus_lambda_times_classification() -> None:
    reward_B, label_B = torch.tensor([0.8, 0.4]), torch.tensor([1.0, 0.0])
    reward_GN = torch.tensor([[0.8, 0.1]])  # only the first image is good
    loss, metrics = reward_loss(
        reward_B,
        label_B,
        torch.ones(2),
        reward_GN,
        torch.ones(1),
        temperature=2.0,
        auxiliary_weight=0.5,
    )
    mse = (0.2**2 + 0.4**2) / 2
    classification = math.log(1 + math.exp((0.1 - 0.8) / 2))
    assert metrics["mse"].item() == pytest.approx(mse)
    assert metrics["prompt_classification"].item() == pytest.approx(classification)
    assert loss.item() == pytest.approx(mse + 0.5 * classification)
    assert not metrics["loss"].requires_grad


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    reward_B, label_B = torch.rand(6, generator=generator), torch.rand(6, generator=generator)
    weight_B = torch.tensor([1.0, 0.5, 2.0, 1.0, 3.0, 1.0])
    whole = reward_mse(reward_B, label_B, weight_B)
    total = float(weight_B.sum())
    parts = [reward_mse(reward_B[i::2], label_B[i::2], weight_B[i::2], total) for i in range(2)]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item())
