"""The fine-tuning objective of "Aligning Text-to-Image Models using Human Feedback" (Lee et al. 2023).

Eq. 2:  L(theta) =        E_{(x,z) ~ D_model}[ -r_phi(x,z) log p_theta(x|z) ]
                   + beta E_{(x,z) ~ D_pre  }[            -log p_theta(x|z) ]

As usual for diffusion models, -log p_theta(x|z) is replaced by the denoising loss of one random timestep:

| paper        | here                   | is                                                              |
|--------------|------------------------|-----------------------------------------------------------------|
| x            | latents_BCHW           | the image, as VAE latents times the scaling factor              |
| z            | (text states)          | the prompt, seen only by the network                            |
| t, epsilon   | timesteps_B, noise_BCHW| noise level and noise                                           |
| alpha_bar_t  | alphas_cumprod_T       | share of the signal's variance left at t: 1 is clean, 0 noise   |
| r_phi(x,z)   | reward_B -> weight_B   | learned reward in [0, 1], and the weight made of it             |
| D_model      | model_*                | images of the pre-trained model (B of them in this part)        |
| D_pre        | pretraining_*          | images of the pre-training data (P of them in this part)        |
| beta         | beta                   | weight of the pre-training term                                 |

Shapes: B samples, P pre-training samples, C latent channels, H W latent height and width, T noise levels.
Everything here is a pure function of tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accord.diffusion.settings import Weighting
from accord.errors import ConfigError, FeedbackError


def add_noise(
    latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor, alphas_cumprod_T: Tensor
) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) epsilon (Ho et al. 2020, Eq. 4), [B, C, H, W]."""
    alpha_B111 = alphas_cumprod_T[timesteps_B].view(-1, 1, 1, 1)
    return alpha_B111.sqrt() * latents_BCHW + (1 - alpha_B111).sqrt() * noise_BCHW


def denoising_target(
    latents_BCHW: Tensor,
    noise_BCHW: Tensor,
    timesteps_B: Tensor,
    alphas_cumprod_T: Tensor,
    prediction_type: str,
) -> Tensor:
    """What the network should predict, [B, C, H, W].

    epsilon: the noise (Ho et al. 2020). v_prediction: sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x
    (Salimans & Ho 2022, appendix D), which stays finite and informative at alpha_bar = 0. sample: the clean
    latents.

    Raises ConfigError for another prediction type.
    """
    if prediction_type == "epsilon":
        return noise_BCHW
    if prediction_type == "sample":
        return latents_BCHW
    if prediction_type == "v_prediction":
        alpha_B111 = alphas_cumprod_T[timesteps_B].view(-1, 1, 1, 1)
        return alpha_B111.sqrt() * noise_BCHW - (1 - alpha_B111).sqrt() * latents_BCHW
    raise ConfigError(
        f"the model's scheduler states prediction_type {prediction_type!r}; fine-tuning knows epsilon, "
        "v_prediction and sample. Correct prediction_type in scheduler/scheduler_config.json."
    )


def denoising_loss(prediction_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Squared error averaged over each sample's C, H and W, in float32: loss_B."""
    return (prediction_BCHW.float() - target_BCHW.float()).square().mean(dim=(1, 2, 3))


def reward_weights(
    reward_B: Tensor, mode: Weighting, *, threshold: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Rewards of a whole data set -> weights of its images in the first term of Eq. 2: weight_B, float32.

    raw: the reward itself, as in the paper. threshold: 1 where reward >= threshold, else 0. softmax:
    exp(reward / temperature), normalised over the data set to mean 1 (so never call it on one batch); a high
    temperature weighs all alike.

    Raises FeedbackError when no image has a weight above 0.
    """
    reward_B = reward_B.float()
    if mode == "raw":
        weight_B = reward_B.clone()
    elif mode == "threshold":
        weight_B = (reward_B >= threshold).float()
    else:
        weight_B = torch.softmax(reward_B.double() / temperature, dim=0).mul(len(reward_B)).float()
    if not bool((weight_B > 0).any()):
        highest = float(reward_B.max()) if len(reward_B) else float("nan")
        raise FeedbackError(
            f"no generated image has a weight above 0 with weighting {mode!r}: {len(reward_B)} images, "
            f"highest reward {highest:.3f}, threshold {threshold}. Lower the threshold, use weighting raw, "
            "or collect more feedback."
        )
    return weight_B


def reward_weighted_likelihood(
    model_loss_B: Tensor,
    weight_B: Tensor,
    pretraining_loss_P: Tensor,
    beta: float,
    num_model: int,
    num_pretraining: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This part's share of Eq. 2: sum(weight * loss) / num_model + beta * sum(loss) / num_pretraining.

    `num_model` and `num_pretraining` are the sizes of the WHOLE batch, over all workers and accumulated
    parts, so that the parts' losses (and gradients) add up to those of the whole batch however it was split.
    Either part may be empty; a term whose whole batch is empty is 0.

    Returns the scalar loss and detached metrics, each of which adds up over the parts in the same way.
    """
    model_term = (weight_B * model_loss_B).sum() / max(num_model, 1)
    pretraining_term = pretraining_loss_P.sum() / max(num_pretraining, 1)
    loss = model_term + beta * pretraining_term
    metrics = {
        "loss": loss.detach(),
        "model_loss": model_term.detach(),
        "model_loss_unweighted": model_loss_B.detach().sum() / max(num_model, 1),
        "pretraining_loss": pretraining_term.detach(),
        "weight_mean": weight_B.detach().sum() / max(num_model, 1),
    }
    return loss, metrics
