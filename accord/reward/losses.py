"""The losses of reward learning, as in Lee et al. 2023 (arXiv 2302.12192), section 3.2.

Notation of the paper                                                          here
    x, z, y          image, prompt, label (1 good, 0 bad)                      label_B
    r(x, z)          the reward, in [0, 1]                                     reward_B
    {z_1 .. z_N}     the true prompt and N - 1 perturbed ones                  the columns of reward_BN, true
    one first T, lambda        temperature, weight of the prompt classification loss     temperature,
    auxiliary_weight

Shapes: B images, G good images, N prompts an image.

Every loss is sum(weight * loss) / weight_sum. A worker that holds a part of a batch passes the `weight_sum`
of the whole batch: then the parts add up to the loss of the whole, however the batch was split.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GOOD = 0.5
"""A label above this is a good image: an aggregated label may be a share of votes."""


def reward_mse(
    reward_B: Tensor, label_B: Tensor, weight_B: Tensor, weight_sum: float | None = None
) -> Tensor:
    """The first term: L_MSE = E[(y - r(x, z))^2], weighted. A scalar; 0 if all weights are 0."""
    return _weighted_mean((label_B - reward_B) ** 2, weight_B, weight_sum)


def prompt_probabilities(reward_BN: Tensor, temperature: float) -> Tensor:
    """Eq. 1: P(i | x, {z_j}) = exp(r(x, z_i) / T) / sum_j exp(r(x, z_j) / T), as probability_BN."""
    return torch.softmax(reward_BN / temperature, dim=-1)


def prompt_classification_loss(
    reward_GN: Tensor, temperature: float, weight_G: Tensor | None = None, weight_sum: float | None = None
) -> Tensor:
    """The second term: the cross-entropy between P of Eq. 1 and the true prompt, which is column 0.

    Only good images may be passed: of a bad image one does not know which prompt it shows. A scalar; 0 for
    none.
    """
    if weight_G is None:
        weight_G = torch.ones_like(reward_GN[:, 0])
    cross_entropy_G = -F.log_softmax(reward_GN / temperature, dim=-1)[:, 0]
    return _weighted_mean(cross_entropy_G, weight_G, weight_sum)


def reward_loss(
    reward_B: Tensor,
    label_B: Tensor,
    weight_B: Tensor,
    reward_GN: Tensor,
    weight_G: Tensor,
    *,
    temperature: float,
    auxiliary_weight: float,
    weight_sum: float | None = None,
    good_weight_sum: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = L_MSE + lambda * L_pc, with its terms as metrics (detached, on the device of the rewards)."""
    mse = reward_mse(reward_B, label_B, weight_B, weight_sum)
    classification = prompt_classification_loss(reward_GN, temperature, weight_G, good_weight_sum)
    loss = mse + auxiliary_weight * classification
    metrics = {"loss": loss, "mse": mse, "prompt_classification": classification}
    return loss, {name: value.detach() for name, value in metrics.items()}


def _weighted_mean(loss_B: Tensor, weight_B: Tensor, weight_sum: float | None) -> Tensor:
    total = weight_B.sum() if weight_sum is None else torch.as_tensor(weight_sum, device=loss_B.device)
    # The smallest normal number instead of 0: no weight at all is a loss of 0, not 0 / 0.
    return (weight_B * loss_B).sum() / total.to(loss_B.dtype).clamp_min(torch.finfo(loss_B.dtype).tiny)
