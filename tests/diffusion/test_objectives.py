import math

import pytest
import torch

from accord.diffusion.objectives import (
    add_noise,
    advantage_weighted_matching,
    batch_loss,
    denoising_loss,
    denoising_target,
    diffusion_nft,
    prompt_advantages,
    reward_weighted_likelihood,
    reward_weights,
)
from accord.errors import ConfigError, FeedbackError

ALPHAS_T = torch.tensor([1.0, 0.64, 0.36, 0.0])  # from clean to exactly nothing left
T_B = torch.arange(4)


def constant(value: float) -> torch.Tensor:
    return torch.full((4, 1, 2, 2), value)


def test_add_noise_by_hand() -> None:
    # sqrt(alpha) * 2 + sqrt(1 - alpha) * 10
    noisy_BCHW = add_noise(constant(2.0), constant(10.0), T_B, ALPHAS_T)
    torch.testing.assert_close(noisy_BCHW[:, 0, 0, 0], torch.tensor([2.0, 1.6 + 6.0, 1.2 + 8.0, 10.0]))


def test_targets_by_hand() -> None:
    latents, noise = constant(2.0), constant(10.0)
    assert denoising_target(latents, noise, T_B, ALPHAS_T, "epsilon") is noise
    assert denoising_target(latents, noise, T_B, ALPHAS_T, "sample") is latents
    # sqrt(alpha) * 10 - sqrt(1 - alpha) * 2
    v_BCHW = denoising_target(latents, noise, T_B, ALPHAS_T, "v_prediction")
    torch.testing.assert_close(v_BCHW[:, 0, 0, 0], torch.tensor([10.0, 8.0 - 1.2, 6.0 - 1.6, -2.0]))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_zero_terminal_snr_is_finite(prediction_type: str) -> None:
    latents, noise = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    target = denoising_target(latents, noise, T_B, ALPHAS_T, prediction_type)
    assert torch.isfinite(target).all()
    assert torch.equal(add_noise(latents, noise, T_B, ALPHAS_T)[3], noise[3])


def test_noisy_sample_and_v_determine_clean_sample() -> None:
    # Salimans & Ho: x = sqrt(alpha) x_t - sqrt(1 - alpha) v
    latents, noise = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    noisy = add_noise(latents, noise, T_B, ALPHAS_T)
    v = denoising_target(latents, noise, T_B, ALPHAS_T, "v_prediction")
    alpha = ALPHAS_T.view(-1, 1, 1, 1)
    torch.testing.assert_close(alpha.sqrt() * noisy - (1 - alpha).sqrt() * v, latents)


def test_targets_agree_with_diffusers() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    latents, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    timesteps = torch.tensor([0, 500, 999])
    alphas = scheduler.alphas_cumprod
    assert alphas[-1] == 0
    torch.testing.assert_close(
        add_noise(latents, noise, timesteps, alphas), scheduler.add_noise(latents, noise, timesteps)
    )
    torch.testing.assert_close(
        denoising_target(latents, noise, timesteps, alphas, "v_prediction"),
        scheduler.get_velocity(latents, noise, timesteps),
    )


def test_unknown_prediction_type() -> None:
    with pytest.raises(ConfigError, match=r"flow.*epsilon, v_prediction and sample"):
        denoising_target(constant(0), constant(0), T_B, ALPHAS_T, "flow")


def test_denoising_loss_by_hand() -> None:
    prediction = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]], [[[0.0, 0.0]], [[0.0, 0.0]]]])
    target = torch.zeros_like(prediction)
    target[1] = 3.0
    torch.testing.assert_close(denoising_loss(prediction, target), torch.tensor([(1 + 4 + 9 + 16) / 4, 9.0]))
    assert denoising_loss(prediction.bfloat16(), target.bfloat16()).dtype == torch.float32


PROMPT_3 = torch.zeros(3, dtype=torch.long)


def test_weights_by_hand() -> None:
    reward = torch.tensor([0.0, 0.5, 1.0])
    assert reward_weights(reward, PROMPT_3, "raw").tolist() == [0.0, 0.5, 1.0]
    assert reward_weights(reward, PROMPT_3, "threshold", threshold=0.5).tolist() == [0.0, 1.0, 1.0]
    total = 1 + math.exp(1) + math.exp(2)  # temperature 0.5
    expected = torch.tensor([3 / total, 3 * math.exp(1) / total, 3 * math.exp(2) / total])
    torch.testing.assert_close(reward_weights(reward, PROMPT_3, "softmax", temperature=0.5), expected)


def test_weights_per_prompt_by_hand() -> None:
    reward, prompt = torch.tensor([0.2, 0.6, 0.9, 0.0, 0.0]), torch.tensor([7, 7, 3, 5, 5])
    raw = reward_weights(reward, prompt, "raw", per_prompt=True)
    torch.testing.assert_close(raw, torch.tensor([0.5, 1.5, 1.0, 0.0, 0.0]))
    kept = reward_weights(reward, prompt, "threshold", threshold=0.5, per_prompt=True)
    torch.testing.assert_close(kept, torch.tensor([0.0, 2.0, 1.0, 0.0, 0.0]))
    soft = reward_weights(reward, prompt, "softmax", temperature=0.4, per_prompt=True)
    share = 1 / (1 + math.exp(1))
    torch.testing.assert_close(soft, torch.tensor([2 * share, 2 * (1 - share), 1.0, 1.0, 1.0]))


@pytest.mark.parametrize("per_prompt", [False, True])
@pytest.mark.parametrize("temperature", [0.01, 0.3, 100.0])
def test_softmax_weights_have_mean_one(temperature: float, per_prompt: bool) -> None:
    prompt = torch.arange(1000) // 10
    weight = reward_weights(
        torch.rand(1000), prompt, "softmax", temperature=temperature, per_prompt=per_prompt
    )
    assert weight.mean().item() == pytest.approx(1.0, abs=1e-4)
    assert (weight >= 0).all()
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("mode", ["raw", "threshold"])
def test_no_weight_left_is_an_error(mode: str) -> None:
    with pytest.raises(FeedbackError, match=r"4 images, highest reward 0\.000"):
        reward_weights(torch.zeros(4), torch.zeros(4), mode)  # type: ignore[arg-type]


def test_advantages_by_hand() -> None:
    reward, prompt = torch.tensor([0.1, 0.3, 0.9, 0.9, 0.4]), torch.tensor([0, 0, 1, 1, 2])
    # centred: -0.1, 0.1, 0, 0, 0; standard deviation sqrt(0.02 / 5)
    expected = torch.tensor([-0.1, 0.1, 0.0, 0.0, 0.0]) / math.sqrt(0.004)
    torch.testing.assert_close(prompt_advantages(reward, prompt, 5.0), expected)
    assert prompt_advantages(reward, prompt, 1.0).abs().max() == 1.0


def test_advantages_need_a_difference() -> None:
    with pytest.raises(FeedbackError, match="no prompt has images of different rewards, among 4 images"):
        prompt_advantages(torch.tensor([0.2, 0.2, 0.7, 0.7]), torch.tensor([0, 0, 1, 1]), 2.0)


def test_signed_objectives_by_hand() -> None:
    prediction, target, reference = constant(3.0), constant(1.0), constant(2.0)
    weight = torch.tensor([2.0, -1.0, 0.5, 0.0])
    torch.testing.assert_close(reward_weighted_likelihood(prediction, target, weight), 4.0 * weight)
    matching = advantage_weighted_matching(prediction, target, reference, weight, anchor=1.5)
    torch.testing.assert_close(matching, 4.0 * weight + 1.5)
    # b = 0.5: f+ = 0.5 * 2 + 0.5 * 3 = 2.5, f- = 1.5 * 2 - 0.5 * 3 = 1.5
    optimality = torch.tensor([1.0, 0.0, 0.25, 0.5])
    nft = diffusion_nft(prediction, target, reference, optimality, strength=0.5)
    torch.testing.assert_close(nft, (optimality * 2.25 + (1 - optimality) * 0.25) / 0.5)


def test_nft_of_sure_images_is_matching_and_of_undecided_ones_stays() -> None:
    target, reference = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    prediction = torch.randn(3, 2, 4, 4, requires_grad=True)
    sure = diffusion_nft(prediction, target, reference, torch.ones(3), strength=1.0)
    torch.testing.assert_close(sure, denoising_loss(prediction, target))
    # r = 1/2: the loss is smallest where the prediction is the reference's.
    undecided = diffusion_nft(prediction, target, reference, torch.full((3,), 0.5), strength=0.7)
    at_reference = diffusion_nft(reference, target, reference, torch.full((3,), 0.5), strength=0.7)
    assert (at_reference < undecided).all()
    (gradient,) = torch.autograd.grad(undecided.sum(), prediction)
    direction = prediction.detach() - reference
    torch.testing.assert_close(gradient, direction * (gradient / direction).flatten()[0])


def test_nft_moves_towards_good_and_away_from_bad_images() -> None:
    target, reference = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    prediction = reference.clone().requires_grad_(True)
    loss = diffusion_nft(prediction, target, reference, torch.tensor([1.0, 0.0]), strength=0.3)
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    towards = ((target - reference) * -gradient).sum(dim=(1, 2, 3))
    assert towards[0] > 0 > towards[1]


def test_equation_2_by_hand() -> None:
    loss, metrics = batch_loss(torch.tensor([0.5, 2.0]), torch.tensor([3.0, 4.0, 5.0]), 0.1, 2, 3)
    # (0.5 + 2) / 2 = 1.25, (3 + 4 + 5) / 3 = 4
    assert loss.item() == pytest.approx(1.25 + 0.1 * 4)
    assert {key: value.item() for key, value in metrics.items()} == pytest.approx(
        {"loss": 1.65, "model_loss": 1.25, "pretraining_loss": 4.0}
    )


def test_equation_2_term_by_term() -> None:
    loss_B, loss_P = torch.rand(6), torch.rand(4)
    none = torch.zeros(0)
    first, _ = batch_loss(loss_B, none, 0.7, 6, 0)
    torch.testing.assert_close(first, loss_B.mean())
    second, _ = batch_loss(none, loss_P, 0.7, 0, 4)
    torch.testing.assert_close(second, 0.7 * loss_P.mean())
    both, _ = batch_loss(loss_B, loss_P, 0.7, 6, 4)
    torch.testing.assert_close(both, first + second)


def test_parts_add_up_however_split() -> None:
    loss_B, loss_P = torch.rand(5), torch.rand(3)
    whole, _ = batch_loss(loss_B, loss_P, 2.0, 5, 3)
    one, _ = batch_loss(loss_B[:4], loss_P[:0], 2.0, 5, 3)
    two, _ = batch_loss(loss_B[4:], loss_P, 2.0, 5, 3)
    torch.testing.assert_close(one + two, whole)
