"""Several reward heads as one module, which gives all their rewards at once, and what these say together.

Where heads that learned the same judgements agree, the reward is sure; where they differ, nothing that they
saw has told them what is right (deep ensembles, Lakshminarayanan et al. 2017).

Shapes: E heads, ... any leading dimensions, P pairs of an image and a prompt, N judged images, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from accord.reward.head import RewardHead, Rows
from accord.reward.settings import Combine
from accord.training import generator_for


class HeadEnsemble(nn.Module):
    """E heads of one form: each parameter is that of all heads, stacked, so that one batched product serves
    all.

    It computes what the heads would compute one after the other. They do not learn from each other: a sum of
    their losses has, for each, the gradient of its own.
    """

    def __init__(self, heads: Sequence[RewardHead]) -> None:
        super().__init__()
        first = heads[0]
        self.size = len(heads)
        self.dim, self.hidden, self.layers, self.combine = (
            first.dim,
            first.hidden,
            first.layers,
            first.combine,
        )
        self.stacked = copy.deepcopy(first)  # its form, which is called with the parameters of each head
        columns = zip(*(head.parameters() for head in heads), strict=True)
        for parameter, column in zip(self.stacked.parameters(), columns, strict=True):
            parameter.data = torch.stack([one.detach() for one in column])

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        masks: Sequence[Tensor] | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """The rewards (E, ...) of all heads. Arguments as RewardHead's, but `masks` are (E, ..., H)."""

        def one(parameters: dict[str, Tensor], masks: tuple[Tensor, ...] | None) -> Tensor:
            rewards: Tensor = functional_call(self.stacked, parameters, (image, text, masks, rows))
            return rewards

        own_masks = None if masks is None else tuple(masks)
        in_dims = (0, None) if masks is None else (0, 0)
        rewards: Tensor = torch.vmap(one, in_dims=in_dims)(dict(self.stacked.named_parameters()), own_masks)
        return rewards

    def member(self, number: int) -> RewardHead:
        """A copy of one of the heads."""
        head = RewardHead(self.dim, self.hidden, self.layers, self.combine)
        state = self.stacked.state_dict()
        head.load_state_dict({name: value[number] for name, value in state.items()})
        return head


Head = RewardHead | HeadEnsemble


def make_head(
    dim: int, hidden: int, layers: int, combine: Combine, size: int, seed: int | None = None
) -> Head:
    """A head, or `size` heads with initial weights of their own. The first of them, and a single one, starts
    alike."""
    heads = [
        RewardHead(
            dim,
            hidden,
            layers,
            combine,
            None if seed is None else generator_for(seed, "head", number),
        )
        for number in range(size)
    ]
    return heads[0] if size == 1 else HeadEnsemble(heads)


def members(rewards: Tensor, head: Head) -> Tensor:
    """What `head` gave, with the dimension of heads: (E, ...), where a single head has E = 1."""
    return rewards if isinstance(head, HeadEnsemble) else rewards[None]


def combined(reward_EP: Tensor, penalty: float = 0.0) -> Tensor:
    """reward_P = mean - penalty * standard deviation, at least 0; of a single head its reward as it is."""
    if len(reward_EP) == 1:
        return reward_EP[0]
    mean_P = reward_EP.mean(dim=0)
    return (mean_P - penalty * reward_EP.std(dim=0)).clamp_min(0.0) if penalty else mean_P


def uncertainty(reward_EP: Tensor) -> Tensor:
    """The standard deviation of the heads' rewards; NaN for a single head, which knows nothing of its own
    doubt."""
    if len(reward_EP) == 1:
        return torch.full_like(reward_EP[0], torch.nan)
    return reward_EP.std(dim=0)


def resampling_weights(size: int, num_images: int, seed: int) -> Tensor:
    """weight_EN, by which each head weighs the judgements: ones for a single head, else drawn from Exp(1).

    That is the Bayesian bootstrap (Rubin 1981): heads differ by as much as chance in who was asked would make
    them differ, also where they start alike (an adapter does) and see the same batches.
    """
    if size == 1:
        return torch.ones(1, num_images)
    rows = [
        torch.empty(num_images).exponential_(generator=generator_for(seed, "resampling", number))
        for number in range(size)
    ]
    return torch.stack(rows)
