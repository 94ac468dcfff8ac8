"""Which prompts and seeds the models are compared on: the same for every model."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from accord.errors import PromptError
from accord.evaluation.config import EvaluateConfig, prompt_plans
from accord.prompts import Grammar, Prompt

if TYPE_CHECKING:  # a recipe's prompts are checked without pandas, which is slow to import
    import pandas as pd

CHOICE = "choice"
TEST = "test"
BEST_OF = "best_of"


def draw_prompts(config: EvaluateConfig, grammar: Grammar, seed: int) -> dict[str, list[Prompt]]:
    """The prompts of each group. None on which a guidance scale is chosen is in another group.

    Raises PromptError, with how many there are, if the grammar has too few.
    """
    unwanted = _unwanted(config, grammar)
    drawn: dict[str, list[Prompt]] = {}
    wanted = {CHOICE: config.choice.prompts, TEST: config.test.prompts, BEST_OF: config.best_of.prompts}
    for group, prompts in wanted.items():
        used = [*unwanted, *drawn.get(CHOICE, [])]
        try:
            drawn[group] = [
                prompt for plan in prompt_plans(prompts) for prompt in grammar.sample(plan, seed, used)
            ]
        except PromptError as error:
            raise PromptError(f"evaluate.{group}.prompts: {error}") from None
    return drawn


def _unwanted(config: EvaluateConfig, grammar: Grammar) -> list[Prompt]:
    if config.reserved_prompts == "any":
        return []
    wanted = config.reserved_prompts == "only"
    return [prompt for prompt in grammar.all_prompts() if is_reserved(prompt) != wanted]


def is_reserved(prompt: Prompt) -> bool:
    """Whether the prompt is one of the third that only confirmations are made on; its text alone decides."""
    return hashlib.sha256(f"reserved {prompt.text}".encode()).digest()[0] % 3 == 0


def evaluation_rows(config: EvaluateConfig, grammar: Grammar, seed: int) -> pd.DataFrame:
    """One row an image that every model makes: group, prompt, category, split, seed.

    The seeds follow from (seed, group, prompt, number), so adding prompts changes no other image.
    """
    import pandas as pd

    images = {
        CHOICE: config.choice.images_per_prompt,
        TEST: config.test.images_per_prompt,
        BEST_OF: config.best_of.candidates,
    }
    rows = [
        {
            "group": group,
            "prompt": prompt.text,
            "category": str(prompt.category),
            "split": str(prompt.split),
            "seed": _image_seed(f"{seed} {group} {prompt.text} {number}"),
        }
        for group, prompts in draw_prompts(config, grammar, seed).items()
        for prompt in prompts
        for number in range(images[group])
    ]
    return pd.DataFrame(rows, columns=["group", "prompt", "category", "split", "seed"])


def _image_seed(name: str) -> int:
    """A seed in [0, 2^31) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1
