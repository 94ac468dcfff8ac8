"""The fine-tuning objectives: that of "Aligning Text-to-Image Models using Human Feedback" (Lee et al. 2023),
and its signed heirs. Each is one function from what the network predicted to a loss of each image, [B].

Lee et al., Eq. 2:  L(theta) =        E_{(x,z) ~ D_model}[ -r_phi(x,z) log p_theta(x|z) ]
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

The heirs replace the first term alone, by one that also pushes away from images worse than their prompt's
others; batch_loss adds the pre-training term to any of them.

Shapes: B samples, P pre-training samples, C latent channels, H W latent height and width, T noise levels.
Everything here is a pure function of tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accord.diffusion.settings import FinetuneConfig, Weighting
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
    reward_N: Tensor,
    prompt_N: Tensor,
    mode: Weighting,
    *,
    threshold: float = 0.5,
    temperature: float = 1.0,
    per_prompt: bool = False,
) -> Tensor:
    """Rewards of a whole data set -> weights of its images in the first term of Eq. 2: weight_N, float32.

    raw: the reward itself, as in the paper. threshold: 1 where reward >= threshold, else 0. softmax:
    exp(reward / temperature), normalised to mean 1 (so never call it on one batch); a high temperature weighs
    all alike. With `per_prompt` the weights of each prompt's images (equal prompt_N, any integers) are scaled
    to mean 1, so that easy prompts, of which more images are good, do not count more than hard ones; a
    prompt without any weight keeps none.

    Raises FeedbackError when no image has a weight above 0.
    """
    reward_N = reward_N.float()
    if mode == "raw":
        weight_N = reward_N.clone()
    elif mode == "threshold":
        weight_N = (reward_N >= threshold).float()
    else:
        # The largest of each prompt is subtracted first, where each is scaled by itself: nothing overflows.
        scaled_N = reward_N.double() / temperature
        top_N = _per_prompt(scaled_N, prompt_N, "amax") if per_prompt else scaled_N.amax()
        weight_N = (scaled_N - top_N).exp()
        weight_N = (weight_N / weight_N.mean()).float()
    if per_prompt:
        weight_N = weight_N / _per_prompt(weight_N, prompt_N, "mean").clamp_min(
            torch.finfo(torch.float32).tiny
        )
    if not bool((weight_N > 0).any()):
        highest = float(reward_N.max()) if len(reward_N) else float("nan")
        raise FeedbackError(
            f"no generated image has a weight above 0 with weighting {mode!r}: {len(reward_N)} images, "
            f"highest reward {highest:.3f}, threshold {threshold}. Lower the threshold, use weighting raw, "
            "or collect more feedback."
        )
    return weight_N


def prompt_advantages(reward_N: Tensor, prompt_N: Tensor, clip: float) -> Tensor:
    """How much better an image is than its prompt's others: advantage_N, float32, in [-clip, clip].

    (r - mean of r over the prompt's images) / s, with s the standard deviation of r about these means over
    the whole data set (Xue et al. 2025 and Zheng et al. 2025 also centre by prompt; one s for all keeps a
    prompt whose images are all alike from being blown up). `prompt_N` names each image's prompt by a number.

    Raises FeedbackError when no prompt has images of different rewards: then nothing is to be learned.
    """
    centred_N = reward_N.double() - _per_prompt(reward_N.double(), prompt_N, "mean")
    spread = float(centred_N.square().mean().sqrt()) if len(centred_N) else 0.0
    if not spread > 1e-9:
        raise FeedbackError(
            f"no prompt has images of different rewards, among {len(reward_N)} images: collect more images "
            "of each prompt, or use objective reward_weighted_likelihood"
        )
    return (centred_N / spread).clamp(-clip, clip).float()


def reward_weighted_likelihood(prediction_BCHW: Tensor, target_BCHW: Tensor, weight_B: Tensor) -> Tensor:
    """The first term of Eq. 2, r * |f_theta(x_t) - target|^2, as loss_B (Lee et al. 2023)."""
    return weight_B * denoising_loss(prediction_BCHW, target_BCHW)


def advantage_weighted_matching(
    prediction_BCHW: Tensor, target_BCHW: Tensor, reference_BCHW: Tensor, advantage_B: Tensor, anchor: float
) -> Tensor:
    """A * |f_theta(x_t) - target|^2 + anchor * |f_theta(x_t) - f_ref(x_t)|^2, as loss_B.

    Advantage-weighted matching (Xue et al. 2025, arXiv 2509.25050): Eq. 2's loss with a centred reward, which
    also pushes away from bad images. The anchor to the reference model f_ref (as in Fan et al. 2025,
    arXiv 2502.06061) bounds it from below: `anchor` must be above the largest -A.
    """
    away_B = denoising_loss(prediction_BCHW, reference_BCHW)
    return advantage_B * denoising_loss(prediction_BCHW, target_BCHW) + anchor * away_B


def diffusion_nft(
    prediction_BCHW: Tensor,
    target_BCHW: Tensor,
    reference_BCHW: Tensor,
    optimality_B: Tensor,
    strength: float,
) -> Tensor:
    """r |f+ - target|^2 + (1 - r) |f- - target|^2, as loss_B: DiffusionNFT (Zheng et al. 2025, arXiv
    2509.16117).

    f+ = (1 - b) f_ref + b f_theta and f- = (1 + b) f_ref - b f_theta are the implicit good and bad policies,
    r in [0, 1] is `optimality_B`, the probability that an image is good among its prompt's, and b is
    `strength`: the lower it is, the further f_theta goes from f_ref. Divided by b, so that the gradient where
    f_theta = f_ref does not depend on it.
    """
    good_BCHW = (1 - strength) * reference_BCHW + strength * prediction_BCHW
    bad_BCHW = (1 + strength) * reference_BCHW - strength * prediction_BCHW
    good_B, bad_B = denoising_loss(good_BCHW, target_BCHW), denoising_loss(bad_BCHW, target_BCHW)
    return (optimality_B * good_B + (1 - optimality_B) * bad_B) / strength


def needs_reference(config: FinetuneConfig) -> bool:
    """Whether the objective compares the network with the frozen reference model."""
    return config.objective in ("advantage_weighted_matching", "diffusion_nft")


def model_loss(
    config: FinetuneConfig,
    prediction_BCHW: Tensor,
    target_BCHW: Tensor,
    reference_BCHW: Tensor | None,
    weight_B: Tensor,
) -> Tensor:
    """The loss of each generated image by the objective of `config`: loss_B.

    `weight_B` is its weight or advantage; `reference_BCHW` is None where there is no reference model, or no
    image.
    """
    if reference_BCHW is None:
        return reward_weighted_likelihood(prediction_BCHW, target_BCHW, weight_B)
    if config.objective == "advantage_weighted_matching":
        return advantage_weighted_matching(
            prediction_BCHW, target_BCHW, reference_BCHW, weight_B, config.anchor
        )
    optimality_B = 0.5 + 0.5 * weight_B / config.advantage_clip
    return diffusion_nft(prediction_BCHW, target_BCHW, reference_BCHW, optimality_B, config.nft_strength)


def batch_loss(
    model_loss_B: Tensor, pretraining_loss_P: Tensor, beta: float, num_model: int, num_pretraining: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """This part's share of Eq. 2: sum(model loss) / num_model + beta * sum(pre-training loss) /
    num_pretraining.

    `num_model` and `num_pretraining` are the sizes of the WHOLE batch, over all workers and accumulated
    parts, so that the parts' losses (and gradients) add up to those of the whole batch however it was split.
    Either part may be empty; a term whose whole batch is empty is 0.

    Returns the scalar loss and detached metrics, each of which adds up over the parts in the same way.
    """
    model_term = model_loss_B.sum() / max(num_model, 1)
    pretraining_term = pretraining_loss_P.sum() / max(num_pretraining, 1)
    loss = model_term + beta * pretraining_term
    metrics = {"loss": loss, "model_loss": model_term, "pretraining_loss": pretraining_term}
    return loss, {name: value.detach() for name, value in metrics.items()}


def _per_prompt(value_N: Tensor, prompt_N: Tensor, reduce: str) -> Tensor:
    """For each image, the mean (or amax) over the images of its prompt."""
    names, index_N = torch.unique(prompt_N, return_inverse=True)
    out_K = value_N.new_zeros(len(names))
    return out_K.scatter_reduce(0, index_N, value_N, reduce, include_self=False)[index_N]
