"""The reward head: a small MLP on frozen CLIP features (Lee et al. 2023, section 3.2: two layers of 1,024,
ReLU).

Shapes: ... any leading dimensions, D features, H hidden units; with rows,
B images, K prompts and P pairs of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from accord.errors import ArtifactError
from accord.reward.settings import Combine

Rows = tuple[Tensor, Tensor]
"""Of each pair, the row of its image and that of its prompt, both [P]."""


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

    def logits(
        self,
        image: Tensor,
        text: Tensor,
        masks: Sequence[Tensor] | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """The reward before the sigmoid: image (..., D), text (..., D) -> (...).

        With `rows` the pairs are those rows of image (B, D) and text (K, D): what can be computed once for an
        image or a prompt is. -> (P,), the same up to rounding.

        `masks`: one (..., H) for each hidden layer, by which its units are multiplied (dropout, drawn by the
        caller so that it depends on nothing but the seed).
        """
        if image.shape[-1] != self.dim or text.shape[-1] != self.dim:
            raise ArtifactError(
                f"this reward head takes features of {self.dim} numbers, got {image.shape[-1]} for the image "
                f"and {text.shape[-1]} for the text: they are of another CLIP"
            )
        if self.combine == "adapter":
            return self._adapted_similarity(image, text, rows)
        if rows is not None:
            return self._above(self._first_layer(image, text, *rows), masks)
        parts = [image, text]
        if self.combine == "concat_product":
            parts.append(image * text * self.dim**0.5)
        values = torch.cat(parts, dim=-1) * self.dim**0.5
        return self._above(self.linears[0](values), masks)

    def _above(self, values: Tensor, masks: Sequence[Tensor] | None) -> Tensor:
        """The logits, from what the first linear map gives."""
        for layer, linear in enumerate(self.linears[1:]):
            values = torch.relu(values)
            if masks is not None:
                values = values * masks[layer]
            values = linear(values)
        return values.squeeze(-1)

    def _first_layer(self, image_BD: Tensor, text_KD: Tensor, image_P: Tensor, text_P: Tensor) -> Tensor:
        """The first linear map of pairs: the map of a concatenation is the sum of the maps of its parts."""
        first = self.linears[0]
        assert isinstance(first, nn.Linear)
        scale, dim = self.dim**0.5, self.dim
        image_BH = (scale * image_BD) @ first.weight[:, :dim].T + first.bias
        text_KH = (scale * text_KD) @ first.weight[:, dim : 2 * dim].T
        values_PH: Tensor = image_BH.index_select(0, image_P) + text_KH.index_select(0, text_P)
        if self.combine == "concat_product":
            product_PD = image_BD.index_select(0, image_P) * text_KD.index_select(0, text_P)
            values_PH = values_PH + (dim * product_PD) @ first.weight[:, 2 * dim :].T
        return values_PH

    def _adapted_similarity(self, image: Tensor, text: Tensor, rows: Rows | None) -> Tensor:
        """s <x + A x, z + B z> + u x + v z + b, which starts as 10 <x, z> - 3 with x, z the features.

        The factors make one learning rate fit all: a map changes slowly, scale and offset quickly.
        """
        image_mapped = image + 0.1 * image @ self.image_map
        text_mapped = text + 0.1 * text @ self.text_map
        image_bias, text_bias = image @ self.image_bias, text @ self.text_bias
        if rows is not None:
            image_P, text_P = rows
            image_mapped, text_mapped = (
                image_mapped.index_select(0, image_P),
                text_mapped.index_select(0, text_P),
            )
            image_bias, text_bias = image_bias[image_P], text_bias[text_P]
        similarity = (image_mapped * text_mapped).sum(-1)
        bias = 5 * (image_bias + text_bias)
        logits: Tensor = (10 + 10 * self.scale) * similarity + bias - 3 + 10 * self.offset
        return logits

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        masks: Sequence[Tensor] | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """The reward in [0, 1]: image (..., D), text (..., D) -> (...); see `logits`."""
        return torch.sigmoid(self.logits(image, text, masks, rows).float())


def _initialise(linear: nn.Module, generator: torch.Generator | None) -> None:
    """He's initialisation for ReLU (uniform), zero biases."""
    assert isinstance(linear, nn.Linear)
    nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu", generator=generator)
    nn.init.zeros_(linear.bias)
