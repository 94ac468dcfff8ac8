"""Prompts with a known meaning: a small grammar of objects, counts, colours and backgrounds.

The method needs prompts whose meaning a program knows, for three things: to ask for feedback by category, to
make the perturbed prompts of the auxiliary loss (Lee et al. 2023, equation 1), and to keep words and pairs of
words out of all feedback, so that generalisation can be measured. A grammar is a YAML file; two ship with the
package, `shapes` and `paper`.

An attribute that a prompt does not name is not asked for: "red star" says nothing of how many, so it differs
in meaning from "one red star". Two prompts of a grammar are equal in meaning only if they are the same text.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from importlib import resources
from itertools import chain, combinations, product, zip_longest
from pathlib import Path
from typing import Self

from pydantic import NonNegativeInt, PositiveInt, model_validator

from accord.config import Config, load_yaml
from accord.errors import PromptError
from accord.prompt_checks import (
    ATTRIBUTES,
    Attribute,
    Category,
    check_held_out,
    check_templates,
    check_words,
    explain,
    fill,
    normal,
    shown,
    unknown,
)

__all__ = ["ATTRIBUTES", "Attribute", "Category", "Grammar", "Prompt", "PromptPlan", "Split", "load_grammar"]

# Every text of a grammar is indexed when it is loaded, so its size has to have an end.
_LARGEST_GRAMMAR = 1_000_000
_MOST_ALTERNATIVES = 65_536


class Split(StrEnum):
    """Whether feedback is collected on a prompt, and if not, what about it is held out."""

    SEEN = "seen"
    UNSEEN_COMBINATION = "unseen_combination"
    UNSEEN_OBJECT = "unseen_object"


# A prompt is perturbed into prompts that are at most as far from the feedback as itself. So training on seen
# prompts never meets a held-out word or pair, not even as a wrong answer.
_NOT_FURTHER: dict[Split, frozenset[Split]] = {
    Split.SEEN: frozenset({Split.SEEN}),
    Split.UNSEEN_COMBINATION: frozenset({Split.SEEN, Split.UNSEEN_COMBINATION}),
    Split.UNSEEN_OBJECT: frozenset(Split),
}


@dataclass(frozen=True)
class Prompt:
    """A text of a grammar with its meaning; `None` is an attribute that it does not ask for."""

    text: str
    category: Category
    split: Split
    object: str
    colour: str | None = None
    count: str | None = None
    background: str | None = None

    @property
    def meaning(self) -> dict[str, str]:
        """What the prompt names: "object", and those of "count", "colour", "background" that it asks for."""
        named = {
            "object": self.object,
            "count": self.count,
            "colour": self.colour,
            "background": self.background,
        }
        return {field: word for field, word in named.items() if word is not None}


class PromptPlan(Config):
    """How many prompts of each category to draw from a split."""

    split: Split = Split.SEEN
    per_category: dict[Category, NonNegativeInt]


class Grammar(Config):
    """The words of a world, how they make a prompt, and which of them are held out of all feedback.

    Held-out pairs: with i the place of an object among the seen objects and j the place of an attribute's
    word, the pairs with colour j = i mod #colours, count j = i mod #counts, background j = (i + 2) mod
    #backgrounds. So each seen object misses one word of each attribute in `held_out_pairs`.
    """

    name: str
    objects: dict[str, str]  # singular: plural
    counts: dict[str, PositiveInt]
    colours: tuple[str, ...]
    backgrounds: tuple[str, ...]  # with the preposition: "on grass"
    templates: dict[Category, str]
    held_out_objects: tuple[str, ...] = ()
    held_out_pairs: tuple[Attribute, ...] = ATTRIBUTES

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_words(self)
        check_held_out(self)
        check_templates(self.templates)
        self._prompts  # noqa: B018 - built here, so that two prompts with one text are found at once
        return self

    @cached_property
    def seen_objects(self) -> tuple[str, ...]:
        """The objects that feedback may be collected on, in the grammar's order."""
        return tuple(word for word in self.objects if word not in self.held_out_objects)

    def words(self, attribute: str) -> tuple[str, ...]:
        """The words of an attribute, in the grammar's order."""
        return {"count": tuple(self.counts), "colour": self.colours, "background": self.backgrounds}[
            attribute
        ]

    def text(
        self, object: str, colour: str | None = None, count: str | None = None, background: str | None = None
    ) -> str:
        """The text that asks for these words, any of which but the object may be absent.

        Raises PromptError for a word that the grammar does not have.
        """
        given = self._given(object, colour, count, background)
        category = _category(given) or Category.COMBINATION
        plural = count is not None and self.counts[count] > 1
        fields = {**given, "object": self.objects[object] if plural else object}
        return fill(self.templates[category], fields)

    def make(
        self, object: str, colour: str | None = None, count: str | None = None, background: str | None = None
    ) -> Prompt:
        """The prompt of these words. Raises PromptError for an unknown word, or if no attribute is given."""
        given = self._given(object, colour, count, background)
        category = _category(given)
        if category is None:
            raise PromptError(
                f"{object!r} alone asks for nothing that can be judged: name a count, colour or background"
            )
        text = self.text(object, colour, count, background)
        return Prompt(text, category, self._split(object, given), object, colour, count, background)

    def all_prompts(self, split: Split | None = None, category: Category | None = None) -> list[Prompt]:
        """Every prompt of the grammar, or of a split and category, in an order that never changes."""
        return [
            prompt
            for prompt in self._prompts.values()
            if split in (None, prompt.split) and category in (None, prompt.category)
        ]

    def parse(self, text: str) -> Prompt:
        """The prompt with this text; case and extra spaces do not matter.

        Raises PromptError that says which word is not known, or what else keeps the text out of the grammar.
        """
        prompt = self._prompts.get(normal(text))
        if prompt is None:
            raise PromptError(
                f"prompt {shown(text)} is not in the grammar {self.name!r}: {explain(self, text)}"
            )
        return prompt

    def perturb(self, prompt: Prompt, n: int, seed: int) -> list[Prompt]:
        """n distinct prompts that each say something else than `prompt`: its wrong answers in equation 1.

        Each names the same attributes, with the word of at least one of them (or the object) replaced. Those
        with one replacement come first, in turn from each attribute: they are the hardest to tell from the
        original. They are never further from the feedback than the prompt: those of a seen prompt are seen.

        Raises PromptError if there are not n of them.
        """
        if self._prompts.get(normal(prompt.text)) != prompt:
            raise PromptError(f"prompt {shown(prompt.text)} is not one of the grammar {self.name!r}")
        generator = random.Random(f"perturb {seed} {prompt.text}")
        found: list[Prompt] = []
        for replacements in range(1, len(prompt.meaning) + 1):
            if len(found) >= n:
                break
            groups = [
                self._replaced(prompt, fields, generator)
                for fields in combinations(prompt.meaning, replacements)
            ]
            generator.shuffle(groups)
            found += (other for other in chain(*zip_longest(*groups)) if other is not None)
        if not 0 <= n <= len(found):
            raise PromptError(
                f"cannot perturb {prompt.text!r} in {n} ways: there are {len(found)}; ask for fewer"
            )
        return found[:n]

    def one_word_changes(self, prompt: Prompt) -> list[Prompt]:
        """All prompts, of any split, that name the same attributes and differ from `prompt` in one word."""
        words = {"object": tuple(self.objects)} | {name: self.words(name) for name in ATTRIBUTES}
        return [
            self.make(**{**prompt.meaning, field: word})
            for field, own in prompt.meaning.items()
            for word in words[field]
            if word != own
        ]

    def sample(self, plan: PromptPlan, seed: int, exclude: Iterable[Prompt] = ()) -> list[Prompt]:
        """Prompts as planned, none twice and none of `exclude`; the same seed gives the same prompts.

        With the same seed, a larger plan starts each category with the prompts of a smaller one.
        Raises PromptError, with how many there are, if a category has too few.
        """
        excluded = {prompt.text for prompt in exclude}
        drawn: list[Prompt] = []
        for category in Category:
            wanted = plan.per_category.get(category, 0)
            there = [p for p in self.all_prompts(plan.split, category) if p.text not in excluded]
            if wanted > len(there):
                raise PromptError(
                    f"the plan asks for {wanted} {category} prompts of the split {plan.split}, but the "
                    f"grammar {self.name!r} has {len(there)}"
                    + (" that are not used elsewhere" if excluded else "")
                )
            random.Random(f"sample {seed} {plan.split} {category}").shuffle(there)
            drawn += there[:wanted]
        return drawn

    @cached_property
    def _prompts(self) -> dict[str, Prompt]:
        """Every prompt, by its normalised text."""
        counts, colours, backgrounds = ((None, *self.words(attribute)) for attribute in ATTRIBUTES)
        size = len(self.objects) * len(counts) * len(colours) * len(backgrounds)
        if size > _LARGEST_GRAMMAR:
            raise ValueError(f"the words make {size} prompts; at most {_LARGEST_GRAMMAR} are supported")
        made = [
            self.make(word, colour, count, background)
            for word, count, colour, background in product(self.objects, counts, colours, backgrounds)
            if count or colour or background
        ]
        order = list(Category)
        prompts: dict[str, Prompt] = {}
        made.sort(key=lambda prompt: order.index(prompt.category))  # stable: keeps the words' order
        for prompt in made:
            other = prompts.setdefault(normal(prompt.text), prompt)
            if other is not prompt:
                raise ValueError(
                    f"{prompt.text!r} could mean both {other.meaning} and {prompt.meaning}: "
                    "change a word or a template"
                )
        return prompts

    @cached_property
    def _held_out(self) -> frozenset[tuple[str, str, str]]:
        """The held-out pairs as (object, attribute, word); the rule is in the class's description."""
        pairs = set()
        for i, seen in enumerate(self.seen_objects):
            for attribute in self.held_out_pairs:
                words = self.words(attribute)
                offset = 2 if attribute == "background" else 0
                pairs.add((seen, attribute, words[(i + offset) % len(words)]))
        return frozenset(pairs)

    def _split(self, object: str, given: Mapping[str, str]) -> Split:
        if object in self.held_out_objects:
            return Split.UNSEEN_OBJECT
        held_out = any((object, attribute, word) in self._held_out for attribute, word in given.items())
        return Split.UNSEEN_COMBINATION if held_out else Split.SEEN

    def _given(
        self, object: str, colour: str | None, count: str | None, background: str | None
    ) -> dict[str, str]:
        """The attributes that are not None, once all words are known to be of the grammar."""
        if object not in self.objects:
            raise PromptError(unknown("object", object, self.objects))
        given: dict[str, str] = {}
        for attribute, word in zip(ATTRIBUTES, (count, colour, background), strict=True):
            if word is None:
                continue
            if word not in self.words(attribute):
                raise PromptError(unknown(attribute, word, self.words(attribute)))
            given[attribute] = word
        return given

    def _replaced(self, prompt: Prompt, fields: tuple[str, ...], generator: random.Random) -> list[Prompt]:
        """All allowed prompts that differ from `prompt` in exactly these fields, shuffled."""
        key = (prompt.text, fields)
        if key not in self._alternatives:
            if len(self._alternatives) >= _MOST_ALTERNATIVES:
                self._alternatives.clear()
            self._alternatives[key] = self._differing(prompt, fields)
        allowed = list(self._alternatives[key])
        generator.shuffle(allowed)
        return allowed

    @cached_property
    def _alternatives(self) -> dict[tuple[str, tuple[str, ...]], tuple[Prompt, ...]]:
        """What `_differing` found: thousands of images share a prompt, and making prompts is slow."""
        return {}

    def _differing(self, prompt: Prompt, fields: tuple[str, ...]) -> tuple[Prompt, ...]:
        meaning = prompt.meaning
        alternatives = []
        for field in fields:
            words = tuple(self.objects) if field == "object" else self.words(field)
            alternatives.append([word for word in words if word != meaning[field]])
        others = []
        for replacement in product(*alternatives):
            meaning.update(zip(fields, replacement, strict=True))
            others.append(self.make(**meaning))
        return tuple(other for other in others if other.split in _NOT_FURTHER[prompt.split])


def load_grammar(name_or_path: str | Path) -> Grammar:
    """A grammar that ships with the package ("shapes", "paper"), or one from a YAML file.

    Raises PromptError if there is no such grammar, ConfigError if the file is not a valid one.
    """
    folder = resources.files("accord") / "grammars"
    shipped = {Path(entry.name).stem: entry for entry in folder.iterdir() if entry.name.endswith(".yaml")}
    if str(name_or_path) in shipped:
        with resources.as_file(shipped[str(name_or_path)]) as path:
            return load_yaml(Grammar, path)
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        known = ", ".join(sorted(shipped))
        raise PromptError(
            f"no grammar {str(name_or_path)!r}: give one of {known}, or the path of a YAML file"
        )
    return load_yaml(Grammar, path)


def _category(given: Mapping[str, str]) -> Category | None:
    if len(given) > 1:
        return Category.COMBINATION
    return next((Category(attribute) for attribute in given), None)
