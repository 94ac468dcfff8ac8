"""The reward head: a small MLP on frozen CLIP features (Lee et al. 2023, section 3.2: two layers of 1,024,
ReLU).

Shapes: ... any leading dimensions, D features, H hidden units, I inputs of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from accord.errors import ArtifactError
from accord.reward.settings import Combine


class RewardHead(nn.Module):
    """r(image, text) in [0, 1] from L2-normalised features of `dim` numbers each.

    A unit vector of D numbers has entries of about 1/sqrt(D), and products of two such vectors 1/D. Both are
    scaled to about 1 before the first layer, so that a learning rate means the same at any D, and the product
    is not drowned.

    Args:
        combine: "concat" feeds (image, text), as the paper does; "concat_product" also their elementwise
            product; "adapter" has no MLP (hidden and layers mean nothing).
        generator: draws the initial weights; without it torch's global one does.
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 1024,
        layers: int = 2,
        combine: Combine = "concat",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.hidden, self.layers, self.combine = dim, hidden, layers, combine
        if combine == "adapter":
            self.image_map, self.text_map = (nn.Parameter(torch.zeros(dim, dim)) for _ in range(2))
            self.image_bias, self.text_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
            self.scale, self.offset = (nn.Parameter(torch.zeros(())) for _ in range(2))
            return
        sizes = [dim * (3 if combine == "concat_product" else 2), *[hidden] * layers, 1]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        for linear in self.linears:
            _initialise(linear, generator)
        last = self.linears[-1]
        assert isinstance(last, nn.Linear)
        # Every reward starts at 1/2. A random last layer starts saturated where good images are few: the
        # gradient of the squared error then vanishes through the sigmoid, and all rewards stay at 0.
        nn.init.zeros_(last.weight)

    def logits(self, image: Tensor, text: Tensor, masks: Sequence[Tensor] | None = None) -> Tensor:
        """The reward before the sigmoid: image (..., D), text (..., D) -> (...).

        `masks`: one (..., H) for each hidden layer, by which its units are multiplied (dropout, drawn by the
        caller so that it depends on nothing but the seed).
        """
        if image.shape[-1] != self.dim or text.shape[-1] != self.dim:
            raise ArtifactError(
                f"this reward head takes features of {self.dim} numbers, got {image.shape[-1]} for the image "
                f"and {text.shape[-1]} for the text: they are of another CLIP"
            )
        if self.combine == "adapter":
            return self._adapted_similarity(image, text)
        parts = [image, text]
        if self.combine == "concat_product":
            parts.append(image * text * self.dim**0.5)
        values = torch.cat(parts, dim=-1) * self.dim**0.5
        for layer, linear in enumerate(self.linears[:-1]):
            values = torch.relu(linear(values))
            if masks is not None:
                values = values * masks[layer]
        logits: Tensor = self.linears[-1](values).squeeze(-1)
        return logits

    def _adapted_similarity(self, image: Tensor, text: Tensor) -> Tensor:
        """s <x + A x, z + B z> + u x + v z + b, which starts as 10 <x, z> - 3 with x, z the features.

        The factors make one learning rate fit all: a map changes slowly, scale and offset quickly.
        """
        image_mapped = image + 0.1 * image @ self.image_map
        text_mapped = text + 0.1 * text @ self.text_map
        similarity = (image_mapped * text_mapped).sum(-1)
        bias = 5 * (image @ self.image_bias + text @ self.text_bias)
        logits: Tensor = (10 + 10 * self.scale) * similarity + bias - 3 + 10 * self.offset
        return logits

    def forward(self, image: Tensor, text: Tensor, masks: Sequence[Tensor] | None = None) -> Tensor:
        """The reward in [0, 1]: image (..., D), text (..., D) -> (...)."""
        return torch.sigmoid(self.logits(image, text, masks))


def _initialise(linear: nn.Module, generator: torch.Generator | None) -> None:
    """He's initialisation for ReLU (uniform), zero biases."""
    assert isinstance(linear, nn.Linear)
    nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu", generator=generator)
    nn.init.zeros_(linear.bias)
