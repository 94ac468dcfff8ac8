"""TextNorm (Kim et al. 2024, arXiv 2404.01863): a reward counts by how far it stands above that of other
prompts.

    r_norm(x, z) = exp(r(x, z) / tau) / sum_{z' in Z(z)} exp(r(x, z') / tau)

with Z(z) the prompt z and prompts that contrast with it.

It is equation 1 of Lee et al. at scoring time, and its contrastive prompts are those of the auxiliary loss:
they differ in a word. An image that would please with any prompt, because it is pretty or because it fools
the reward, gains nothing by it.

Shapes: B images, E heads, N prompts an image, K prompts, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from accord.errors import ConfigError, PromptError
from accord.prompts import Grammar, Prompt
from accord.reward.ensemble import combined
from accord.reward.features import Pixels, unique
from accord.reward.losses import prompt_probabilities
from accord.reward.model import RewardModel

_PAIRS = 65536
"""Pairs whose features are in memory at once, at most."""


def contrast_prompts(grammar: Grammar, prompt: Prompt, count: int, seed: int = 0) -> tuple[str, ...]:
    """Up to `count` prompts that say something else than `prompt`: as many as there are."""
    for number in range(count, 0, -1):
        try:
            return tuple(other.text for other in grammar.perturb(prompt, number, seed))
        except PromptError:
            continue
    return ()


class TextNormalised:
    """A scorer: the probability of an image's own prompt among its contrastive ones, in (0, 1).

    Of an ensemble, each head's rewards are normalised, then combined as its rewards are.

    Args:
        temperature: tau; by default the model's T of equation 1. The lower, the more a small difference
            counts.
        num_prompts: N, the prompt itself included; fewer where the grammar has fewer.
        seed: draws the contrastive prompts of each prompt.

    Raises:
        ConfigError: a temperature or a number of prompts that cannot be.
    """

    def __init__(
        self,
        model: RewardModel,
        grammar: Grammar,
        *,
        temperature: float | None = None,
        num_prompts: int = 10,
        seed: int = 0,
    ) -> None:
        self.temperature = model.temperature if temperature is None else temperature
        if self.temperature <= 0 or num_prompts < 2:
            raise ConfigError(
                f"text_normalised has temperature {self.temperature} and num_prompts {num_prompts}; expected "
                "a temperature above 0 and at least 2 prompts, one of which is the image's own"
            )
        self._model, self._grammar, self._count, self._seed = model, grammar, num_prompts - 1, seed
        self._known: dict[str, tuple[str, ...]] = {}

    def score(self, images: Sequence[Pixels], prompts: Sequence[str]) -> Tensor:
        """score_B of each uint8 RGB image (HWC) for its own prompt. PromptError: see `score_features`."""
        return self.score_features(self._model.encoder.image_features(images), prompts)

    @torch.inference_mode()
    def score_features(self, image_BD: Tensor, prompts: Sequence[str]) -> Tensor:
        """The same from features of the model's CLIP.

        Raises:
            PromptError: a prompt is not of the grammar, or has none that contrasts with it.
        """
        sets = [(prompt, *self._contrasts(prompt)) for prompt in prompts]
        texts = unique(text for own in sets for text in own)
        place = {text: row for row, text in enumerate(texts)}
        text_KD = self._model.encoder.text_features(texts)
        scores_B = torch.zeros(len(prompts), device=text_KD.device)
        for size in sorted({len(own) for own in sets}):  # prompts with few contrasts are normalised over few
            rows = [row for row, own in enumerate(sets) if len(own) == size]
            for start in range(0, len(rows), max(_PAIRS // size, 1)):
                part = rows[start : start + max(_PAIRS // size, 1)]
                text_index = [place[text] for row in part for text in sets[row]]
                image_PD = image_BD[part].repeat_interleave(size, dim=0)
                reward_EP = self._model.head_rewards(image_PD, text_KD[text_index])
                probability_EBN = prompt_probabilities(
                    reward_EP.reshape(len(reward_EP), -1, size), self.temperature
                )
                scores_B[part] = combined(probability_EBN[..., 0], self._model.uncertainty_penalty)
        return scores_B

    def _contrasts(self, text: str) -> tuple[str, ...]:
        if text not in self._known:
            others = contrast_prompts(self._grammar, self._grammar.parse(text), self._count, self._seed)
            if not others:
                raise PromptError(
                    f"the grammar {self._grammar.name!r} has no other prompt to compare {text!r} with: its "
                    "reward cannot be normalised"
                )
            self._known[text] = others
        return self._known[text]
