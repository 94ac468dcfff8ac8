from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.errors import ConfigError, PromptError
from accord.prompts import Category, Grammar, Prompt, PromptPlan, Split, load_grammar

SHAPES = load_grammar("shapes")
PAPER = load_grammar("paper")
BOTH = pytest.mark.parametrize("grammar", [SHAPES, PAPER], ids=["shapes", "paper"])

some_grammar = st.sampled_from([SHAPES, PAPER])
seeds = st.integers(min_value=0, max_value=2**31)
# The first examples load caches on a busy machine: time is not what these tests are about.
relaxed = settings(deadline=None, max_examples=60)


@st.composite
def grammar_and_prompt(draw: st.DrawFn) -> tuple[Grammar, Prompt]:
    grammar = draw(some_grammar)
    split = draw(st.sampled_from(list(Split)))
    category = draw(st.sampled_from([c for c in Category if grammar.all_prompts(split, c)]))
    return grammar, draw(st.sampled_from(grammar.all_prompts(split, category)))


def small(**changes: Any) -> dict[str, Any]:
    """A valid grammar of few words, with changes."""
    return {
        "name": "small",
        "objects": {"dog": "dogs", "wolf": "wolves", "sheep": "sheep"},
        "held_out_objects": ["wolf"],
        "counts": {"one": 1, "two": 2},
        "colours": ["red", "blue"],
        "backgrounds": ["on grass", "at night"],
        "templates": {
            "count": "{count} {object}",
            "colour": "{colour} colored {object}",
            "background": "{object} {background}",
            "combination": "[{count}] [{colour} colored] {object} [{background}]",
        },
        **changes,
    }


def write(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small(**changes), sort_keys=False))
    return path


# --- texts


@pytest.mark.parametrize(
    ("words", "text", "category"),
    [
        ({"count": "two"}, "two stars", "count"),
        ({"count": "one"}, "one star", "count"),
        ({"colour": "red"}, "red star", "colour"),
        ({"background": "on grass"}, "star on grass", "background"),
        (
            {"colour": "red", "count": "two", "background": "on grass"},
            "two red stars on grass",
            "combination",
        ),
        ({"colour": "red", "background": "on grass"}, "red star on grass", "combination"),
        ({"colour": "red", "count": "one"}, "one red star", "combination"),
        ({"count": "three", "background": "at night"}, "three stars at night", "combination"),
    ],
)
def test_shapes_text(words: dict[str, str], text: str, category: str) -> None:
    prompt = SHAPES.make("star", **words)
    assert prompt.text == SHAPES.text("star", **words) == text
    assert prompt.category == category
    assert prompt.meaning == {"object": "star", **words}


def test_object_alone_is_a_text_but_not_a_prompt() -> None:
    assert SHAPES.text("star") == "star"
    with pytest.raises(PromptError, match="'star' alone asks for nothing that can be judged"):
        SHAPES.make("star")


@pytest.mark.parametrize(
    ("one", "many"), [("wolf", "wolves"), ("box", "boxes"), ("cross", "crosses"), ("bicycle", "bicycles")]
)
def test_irregular_plurals(one: str, many: str) -> None:
    grammar = PAPER if one in PAPER.objects else SHAPES
    assert grammar.text(one, count="one") == f"one {one}"
    assert grammar.text(one, count="three") == f"three {many}"
    assert many in grammar.text(one, count="two", background=grammar.backgrounds[0])


def test_object_whose_plural_is_its_singular() -> None:
    grammar = Grammar(**small())
    assert grammar.parse("two sheep").count == "two"
    assert grammar.parse("one sheep").count == "one"


def test_paper_words() -> None:
    assert len(PAPER.objects) == 25
    assert list(PAPER.counts.values()) == [1, 2, 3, 4, 5, 6]
    assert (len(PAPER.colours), len(PAPER.backgrounds)) == (9, 8)
    assert set(PAPER.held_out_objects) == {"tiger", "rabbit", "rose", "wolf", "bear"}
    assert PAPER.text("dog", colour="red") == "red colored dog"
    assert PAPER.text("dog", "green", "two", "on the table") == "two green colored dogs on the table"


def test_a_number_of_prompts_for_each_category() -> None:
    sizes = {category: len(SHAPES.all_prompts(category=category)) for category in Category}
    # 6 objects, 4 counts, 6 colours, 5 backgrounds; so combinations: 4*6 + 4*5 + 6*5 + 4*6*5 = 194 an object
    assert sizes == {"count": 24, "colour": 36, "background": 30, "combination": 6 * 194}


# --- uniqueness, parsing


@BOTH
def test_no_text_and_no_meaning_twice(grammar: Grammar) -> None:
    prompts = grammar.all_prompts()
    assert len({prompt.text.casefold() for prompt in prompts}) == len(prompts)
    assert len({tuple(prompt.meaning.items()) for prompt in prompts}) == len(prompts)


@BOTH
def test_every_prompt_parses_to_itself(grammar: Grammar) -> None:
    for prompt in grammar.all_prompts():
        assert grammar.parse(prompt.text) == prompt
        assert grammar.make(**prompt.meaning) == prompt


@relaxed
@given(grammar_and_prompt(), st.sampled_from([str.upper, str.title, "  {}\n".format]))
def test_parse_ignores_case_and_spaces(drawn: tuple[Grammar, Prompt], change: Any) -> None:
    grammar, prompt = drawn
    assert grammar.parse(change(prompt.text).replace(" ", "  ")) == prompt


@relaxed
@given(st.text())
def test_parse_never_fails_in_another_way(text: str) -> None:
    with pytest.raises(PromptError, match="is not in the grammar 'shapes'"):
        SHAPES.parse(text + " x")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("two stras", r"unknown word 'stras' \(did you mean 'stars'\?\).*objects: circle, square"),
        ("two dragons on grass", "unknown word 'dragons'.*backgrounds: in the sky, on grass"),
        ("two star", "did you mean 'two stars'"),
        ("stars two red", "did you mean 'two red stars'"),
        ("two hearts in snow", "did you mean 'two hearts'.*in the snow"),
        ("star", "asks for nothing that can be judged; name a count, colour or background"),
        ("red blue star", "names 2 colours: red, blue; name one"),
        ("red star circle", "names 2 objects: circle, star; name one"),
        ("red on grass", "names no object"),
        ("", "names no object"),
        ("z" * 100_000, r"unknown word 'z{80}\.\.\.'"),
    ],
)
def test_parse_says_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(PromptError, match=says) as caught:
        SHAPES.parse(text)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"object": "wolf"}, "unknown object 'wolf'; known: circle"),
        ({"object": "star", "colour": "rde"}, r"unknown colour 'rde' \(did you mean 'red'\?\)"),
        ({"object": "star", "count": "nine"}, "unknown count 'nine'"),
        ({"object": "star", "background": "grass"}, "unknown background 'grass'"),
    ],
)
def test_text_with_an_unknown_word(words: dict[str, str], says: str) -> None:
    with pytest.raises(PromptError, match=says):
        SHAPES.text(**words)


# --- splits


@BOTH
def test_splits_and_categories_partition(grammar: Grammar) -> None:
    parts = [grammar.all_prompts(split, category) for split in Split for category in Category]
    together = [prompt for part in parts for prompt in part]
    assert Counter(together) == Counter(grammar.all_prompts())
    assert all(grammar.all_prompts(split) for split in Split)


def test_held_out_pairs_follow_the_rule() -> None:
    # Seen objects: 0 circle, 1 square, 2 triangle, 3 star, 4 cross (heart is held out and has no number).
    held_out = [
        "red circle",
        "one circle",
        "circle in the desert",
        "yellow star",
        "four stars",
        "star in the sky",
    ]
    held_out += [
        "purple cross",
        "one cross",
        "cross on grass",
        "two red circles at night",
        "yellow star at night",
    ]
    seen = [
        "red star",
        "two stars",
        "star on grass",
        "two red stars on grass",
        "purple circle",
        "blue circle",
    ]
    for text in held_out:
        assert SHAPES.parse(text).split is Split.UNSEEN_COMBINATION, text
    for text in seen:
        assert SHAPES.parse(text).split is Split.SEEN, text
    for text in ("red heart", "two hearts", "two blue hearts in the sky"):
        assert SHAPES.parse(text).split is Split.UNSEEN_OBJECT, text


@BOTH
def test_every_word_that_is_not_held_out_is_seen(grammar: Grammar) -> None:
    seen = {word for prompt in grammar.all_prompts(Split.SEEN) for word in prompt.meaning.values()}
    assert seen == {*grammar.seen_objects, *grammar.counts, *grammar.colours, *grammar.backgrounds}


def test_paper_holds_out_no_counts() -> None:
    assert not PAPER.all_prompts(Split.UNSEEN_COMBINATION, Category.COUNT)
    assert len(PAPER.all_prompts(Split.SEEN, Category.COUNT)) == 20 * 6


# --- perturbed prompts


@relaxed
@given(grammar_and_prompt(), st.integers(0, 9), seeds)
def test_perturbed_prompts(drawn: tuple[Grammar, Prompt], n: int, seed: int) -> None:
    grammar, prompt = drawn
    perturbed = grammar.perturb(prompt, n, seed)
    assert len(perturbed) == len({other.text for other in perturbed}) == n
    assert perturbed == grammar.perturb(prompt, n, seed)
    near = {Split.SEEN: {Split.SEEN}, Split.UNSEEN_COMBINATION: {Split.SEEN, Split.UNSEEN_COMBINATION}}
    for other in perturbed:
        assert other.meaning != prompt.meaning
        assert other.meaning.keys() == prompt.meaning.keys()
        assert other == grammar.parse(other.text)
        assert other.split in near.get(prompt.split, set(Split))
        assert other.object in grammar.seen_objects or prompt.split is Split.UNSEEN_OBJECT


def test_perturbed_prompts_change_one_thing_first_and_each_in_turn() -> None:
    prompt = SHAPES.parse("two red stars on grass")
    # There is one object (held out: "red circle", "two squares", "cross on grass"), and, with "four stars",
    # "yellow star" and "star in the sky" held out, two counts, four colours and three backgrounds.
    perturbed = SHAPES.perturb(prompt, 1 + 2 + 4 + 3, seed=3)
    changed = [
        {field for field in prompt.meaning if other.meaning[field] != prompt.meaning[field]}
        for other in perturbed
    ]
    assert all(len(fields) == 1 for fields in changed)
    fields = [next(iter(fields)) for fields in changed]
    assert set(fields[:4]) == {"object", "count", "colour", "background"}
    assert set(fields[4:7]) == {"count", "colour", "background"}
    assert (set(fields[7:9]), fields[9]) == ({"colour", "background"}, "colour")


def test_one_word_changes_are_all_there_are() -> None:
    prompt = SHAPES.parse("two red stars on grass")
    others = SHAPES.one_word_changes(prompt)
    assert len(others) == len(set(others)) == 5 + 3 + 5 + 4
    for other in others:
        assert sum(other.meaning[field] != prompt.meaning[field] for field in prompt.meaning) == 1
    assert any(other.split is Split.UNSEEN_OBJECT for other in others)


def test_perturb_finds_all_there_are_and_no_more() -> None:
    prompt = SHAPES.parse("two stars")  # seen
    others = {p.text for p in SHAPES.all_prompts(Split.SEEN, Category.COUNT)} - {"two stars"}
    assert {p.text for p in SHAPES.perturb(prompt, 14, seed=0)} == others
    with pytest.raises(PromptError, match="cannot perturb 'two stars' in 15 ways: there are 14"):
        SHAPES.perturb(prompt, 15, seed=0)
    with pytest.raises(PromptError, match="in -1 ways"):
        SHAPES.perturb(prompt, -1, seed=0)


def test_perturb_depends_on_the_seed_and_the_grammar() -> None:
    prompt = PAPER.parse("two green colored dogs on the table")
    assert len({tuple(PAPER.perturb(prompt, 5, seed)) for seed in range(10)}) == 10
    with pytest.raises(PromptError, match="is not one of the grammar 'shapes'"):
        SHAPES.perturb(prompt, 5, seed=0)


# --- sampling


def test_the_paper_plan_gives_2774_prompts() -> None:
    plan = PromptPlan(per_category={"count": 108, "colour": 58, "background": 80, "combination": 2528})
    prompts = PAPER.sample(plan, seed=0)
    assert len(set(prompts)) == len({prompt.text for prompt in prompts}) == 2774
    assert Counter(p.category for p in prompts) == plan.per_category
    assert {prompt.split for prompt in prompts} == {Split.SEEN}


@relaxed
@given(some_grammar, st.sampled_from(list(Split)), st.integers(0, 5), seeds)
def test_sample(grammar: Grammar, split: Split, wanted: int, seed: int) -> None:
    categories = [category for category in Category if len(grammar.all_prompts(split, category)) > wanted]
    plan = PromptPlan(split=split, per_category=dict.fromkeys(categories, wanted))
    prompts = grammar.sample(plan, seed)
    assert len(set(prompts)) == wanted * len(categories)
    assert {prompt.split for prompt in prompts} <= {split}
    assert prompts == grammar.sample(plan, seed)
    for category in categories:
        of_category = [prompt for prompt in prompts if prompt.category == category]
        one_more = grammar.sample(PromptPlan(split=split, per_category={category: wanted + 1}), seed)
        assert one_more[:-1] == of_category


def test_sample_leaves_out_what_is_used_elsewhere() -> None:
    half = PromptPlan(per_category={Category.COLOUR: 12})
    first = SHAPES.sample(half, seed=0)
    second = SHAPES.sample(half, seed=1, exclude=first)
    assert len({*first, *second}) == 24
    with pytest.raises(PromptError, match=r"asks for 12 colour prompts .*has 1 that are not used elsewhere"):
        SHAPES.sample(half, seed=2, exclude=[*first, *second])


def test_sample_of_more_than_there_are() -> None:
    with pytest.raises(PromptError, match=r"100 count prompts of the split seen, .* 'shapes' has 15"):
        SHAPES.sample(PromptPlan(per_category={Category.COUNT: 100}), seed=0)


# --- loading and validating


def test_grammar_from_a_file(tmp_path: Path) -> None:
    assert load_grammar(write(tmp_path)) == Grammar(**small())
    with pytest.raises(PromptError, match=r"no grammar 'shape': give one of paper, shapes, or the path"):
        load_grammar("shape")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"objects": {}}, "needs at least one object"),
        ({"colours": ["red", "blue", "red"]}, "colours: 'red' is there twice"),
        ({"colours": ["red", "Dogs"]}, r"colours: 'Dogs' is there twice \(it is already in objects\)"),
        ({"colours": ["red", "{x}"]}, "colours: '{x}' has to be words"),
        ({"colours": ["red", ""]}, "colours: '' has to be words"),
        ({"counts": {"one": 1, "two": 2, "couple": 2}}, "counts: two, couple mean the same number"),
        ({"counts": {"none": 0, "one": 1}}, "counts.none: .*greater than 0"),
        ({"held_out_objects": ["wolfs"]}, r"unknown object 'wolfs' \(did you mean 'wolf'\?\)"),
        ({"held_out_objects": ["dog", "wolf", "sheep"]}, "all objects are held out"),
        ({"backgrounds": ["on grass"]}, "held_out_pairs: background has a single word"),
        ({"held_out_pairs": ["size"]}, "held_out_pairs"),
        ({"colors": ["red"]}, "unknown key 'colors'"),
    ],
)
def test_invalid_words(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        load_grammar(write(tmp_path, **changes))
    assert "small.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("category", "template", "says"),
    [
        ("count", "{object}", r"count needs {count} exactly once, but it is '{object}'"),
        ("colour", "{colour}", r"colour needs {object} exactly once"),
        ("colour", "{colour} {colour} {object}", r"needs {colour} exactly once"),
        ("colour", "{colour} {object} {size}", r"cannot fill {size}"),
        ("count", "{count} {object} {colour}", r"cannot fill {colour}"),
        ("count", "[{count}] {object}", r"always has {count}: take it out of \[...\]"),
        ("combination", "[{count}] [{colour}] {object}", r"needs {background} exactly once"),
        ("combination", "{count} [{colour}] {object} [{background}]", r"each of .* belongs in \[...\]"),
        ("combination", "[{count}] [{colour}] [{object}] [{background}]", "always has {object}"),
        ("combination", "[{count} [{colour}]] {object} [{background}]", "unmatched or nested bracket"),
        ("colour", "{colour} {object", "needs {object} exactly once"),
        ("colour", "{colour} {object}}", "unmatched or nested bracket"),
        ("count", "{count} {colour!r} {object}", "cannot fill {colour!r}"),
    ],
)
def test_invalid_templates(category: str, template: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Grammar(**small(templates={**small()["templates"], category: template}))


def test_too_many_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accord.prompts._LARGEST_GRAMMAR", 80)
    with pytest.raises(ValueError, match="the words make 81 prompts; at most 80"):
        Grammar(**small())


def test_missing_template() -> None:
    with pytest.raises(ValueError, match="there is none for background; each of count, colour"):
        Grammar(**small(templates={"count": "{count} {object}", "colour": "{colour} {object}"}))


def test_two_meanings_of_one_text() -> None:
    # "light" + "blue dog" and "light blue" + "dog" are both written "light blue dog".
    ambiguous = small(
        objects={"dog": "dogs", "blue dog": "blue dogs"}, held_out_objects=[], colours=["light", "light blue"]
    )
    ambiguous["templates"]["colour"] = "{colour} {object}"
    with pytest.raises(ValueError, match="'light blue dog' could mean both"):
        Grammar(**ambiguous)
