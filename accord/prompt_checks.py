"""What can be wrong with a grammar or with a text, said so that it can be put right; and the templates.

This is the inside of accord.prompts: use that module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from enum import StrEnum
from itertools import chain
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from accord.prompts import Grammar

Attribute = Literal["count", "colour", "background"]
ATTRIBUTES: tuple[Attribute, ...] = get_args(Attribute)

_FIELD = re.compile(r"\{(.*?)\}")
_OPTIONAL = re.compile(r"\[(.*?)\]")


class Category(StrEnum):
    """What a prompt asks of its object: one attribute, or at least two of them."""

    COUNT = "count"
    COLOUR = "colour"
    BACKGROUND = "background"
    COMBINATION = "combination"


def fill(template: str, fields: Mapping[str, str]) -> str:
    """The template's text: a [bracket] is kept only if all its fields are there, spaces are evened out."""

    def keep(match: re.Match[str]) -> str:
        return match[1] if all(field in fields for field in _FIELD.findall(match[1])) else ""

    return " ".join(_OPTIONAL.sub(keep, template).format_map(fields).split())


def normal(text: str) -> str:
    return " ".join(text.casefold().split())


def shown(text: str, longest: int = 80) -> str:
    return repr(text if len(text) <= longest else text[:longest] + "...")


# --- what is wrong with a text


def unknown(kind: str, word: str, known: Iterable[str]) -> str:
    words = list(known)
    close = get_close_matches(word, words, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown {kind} {shown(word)}{hint}; known: {', '.join(words)}"


def explain(grammar: Grammar, text: str) -> str:
    """Why a text is not in the grammar, for its error message."""
    said = normal(text).split()[:50]
    literals = (_FIELD.sub(" ", template) for template in grammar.templates.values())
    known = {
        word
        for phrase in chain(_phrases(grammar), literals)
        for word in re.split(r"[\[\]\s]+", phrase.casefold())
    }
    known.discard("")
    vocabulary = {"objects": tuple(grammar.objects), "counts": grammar.words("count")}
    vocabulary |= {"colours": grammar.colours, "backgrounds": grammar.backgrounds}
    listed = "; ".join(f"{kind}: {', '.join(words)}" for kind, words in vocabulary.items())
    strange = next((word for word in said if word not in known), None)
    if strange is not None:
        close = get_close_matches(strange, sorted(known), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return f"unknown word {shown(strange)}{hint}. Known {listed}"
    named = dict(_named(grammar, f" {' '.join(said)} "))
    for field, words in named.items():
        if len(words) > 1:
            return f"it names {len(words)} {field}s: {', '.join(words)}; name one"
    if not named["object"]:
        return f"it names no object. Known {listed}"
    meaning = {field: words[0] for field, words in named.items() if words}
    if len(meaning) == 1:
        return f"it asks for nothing that can be judged; name a count, colour or background. Known {listed}"
    return f"did you mean {grammar.text(**meaning)!r}? Known {listed}"


def _phrases(grammar: Grammar) -> Iterator[str]:
    yield from chain(
        grammar.objects, grammar.objects.values(), grammar.counts, grammar.colours, grammar.backgrounds
    )


def _named(grammar: Grammar, spaced_text: str) -> Iterator[tuple[str, list[str]]]:
    """For each field, the words of the grammar that a text names, whatever their order."""

    def says(phrase: str) -> bool:
        return f" {normal(phrase)} " in spaced_text

    yield "object", [one for one, many in grammar.objects.items() if says(one) or says(many)]
    for attribute in ATTRIBUTES:
        yield attribute, [word for word in grammar.words(attribute) if says(word)]


# --- what is wrong with a grammar (pydantic reports these ValueErrors with the name of the file)


def check_words(grammar: Grammar) -> None:
    if not grammar.objects:
        raise ValueError("a grammar needs at least one object")
    forms = (
        form
        for one, many in grammar.objects.items()
        for form in ({one, many} if one == many else (one, many))
    )
    owners: dict[str, str] = {}
    kinds = {
        "objects": forms,
        "counts": grammar.counts,
        "colours": grammar.colours,
        "backgrounds": grammar.backgrounds,
    }
    for kind, words in kinds.items():
        for word in words:
            if not word.strip() or word != " ".join(word.split()) or set(word) & set("[]{}"):
                raise ValueError(
                    f"{kind}: {word!r} has to be words with single spaces, without brackets or braces"
                )
            if normal(word) in owners:
                raise ValueError(f"{kind}: {word!r} is there twice (it is already in {owners[normal(word)]})")
            owners[normal(word)] = kind
    values = list(grammar.counts.values())
    repeated = [word for word, value in grammar.counts.items() if values.count(value) > 1]
    if repeated:
        raise ValueError(
            f"counts: {', '.join(repeated)} mean the same number, so prompts would be equal in meaning"
        )


def check_held_out(grammar: Grammar) -> None:
    for word in grammar.held_out_objects:
        if word not in grammar.objects:
            raise ValueError(f"held_out_objects: {unknown('object', word, grammar.objects)}")
    if not grammar.seen_objects:
        raise ValueError(
            "held_out_objects: all objects are held out, so there is nothing to collect feedback on"
        )
    for attribute in grammar.held_out_pairs:
        if len(grammar.words(attribute)) == 1:
            raise ValueError(
                f"held_out_pairs: {attribute} has a single word, which would be held out for every object; "
                f"add a word, or leave {attribute} out of held_out_pairs"
            )


def check_templates(templates: Mapping[Category, str]) -> None:
    for category in Category:
        if category not in templates:
            raise ValueError(
                f"templates: there is none for {category}; each of {', '.join(Category)} needs one"
            )
        template = templates[category]
        needed = {"object", *(ATTRIBUTES if category is Category.COMBINATION else (category.value,))}
        fields = _FIELD.findall(template)
        for field in sorted(needed):
            if fields.count(field) != 1:
                raise ValueError(
                    f"templates: {category} needs {{{field}}} exactly once, but it is {template!r}"
                )
        if set(fields) - needed:
            raise ValueError(
                f"templates: {category} cannot fill {{{min(set(fields) - needed)}}} of {template!r}"
            )
        if set(_OPTIONAL.sub("", _FIELD.sub("", template))) & set("[]{}"):
            raise ValueError(f"templates: {category} has an unmatched or nested bracket: {template!r}")
        optional = {field for part in _OPTIONAL.findall(template) for field in _FIELD.findall(part)}
        always = optional & needed if category is not Category.COMBINATION else optional & {"object"}
        if always:
            raise ValueError(
                f"templates: {category} always has {{{min(always)}}}: take it out of [...] in {template!r}"
            )
        if category is Category.COMBINATION and optional != set(ATTRIBUTES):
            raise ValueError(
                f"templates: combination leaves out what a prompt does not name, so each of "
                f"{', '.join(ATTRIBUTES)} belongs in [...], but it is {template!r}"
            )
