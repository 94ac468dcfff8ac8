"""The `evaluate` section: what it accepts, and the prompts that it leads to."""

import pytest

from accord.config import validate
from accord.errors import ConfigError, PromptError
from accord.evaluation.config import EvaluateConfig, prompt_plans
from accord.evaluation.plan import draw_prompts, evaluation_rows, is_reserved
from accord.prompts import Category, Split, load_grammar


def config(**sections: object) -> EvaluateConfig:
    return validate(EvaluateConfig, dict(sections), "test")


def test_reads_splits_and_categories_by_name_and_sorts_scales() -> None:
    made = config(
        guidance_scales=[3, 1.5], test={"prompts": {"unseen_object": {"count": 2}, "seen": {"colour": 1}}}
    )
    assert made.guidance_scales == (1.5, 3.0)
    plans = prompt_plans(made.test.prompts)
    assert [(plan.split, plan.per_category) for plan in plans] == [
        (Split.SEEN, {Category.COLOUR: 1}),
        (Split.UNSEEN_OBJECT, {Category.COUNT: 2}),
    ]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"test": {"raters": 9, "quorum": 4}}, "more than half"),
        ({"test": {"raters": 5, "quorum": 7}}, "more than half"),
        ({"best_of": {"candidates": 8, "sizes": [1, 16]}}, "at most candidates"),
        ({"guidance_scales": []}, "at least one"),
        ({"second_reward": "reward"}, "not the reward that is trained on"),
        ({"guidance_scales": [1, 1]}, "none twice"),
        ({"guidance_scale": [1]}, "did you mean 'guidance_scales'"),
        ({"choice": {"prompts": {"sen": {"count": 1}}}}, "choice.prompts"),
    ],
)
def test_wrong_values_are_explained(sections: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**sections)


def test_no_prompt_chooses_guidance_and_makes_a_claim() -> None:
    counts = {"seen": {"count": 3, "combination": 3}, "unseen_object": {"colour": 2}}
    made = config(choice={"prompts": counts}, test={"prompts": counts}, best_of={"prompts": counts})
    drawn = draw_prompts(made, load_grammar("shapes"), seed=0)
    choice, test, best_of = ({prompt.text for prompt in drawn[g]} for g in ("choice", "test", "best_of"))
    assert len(choice) == len(test) == len(best_of) == 8
    assert not choice & test
    assert not choice & best_of


def test_rows_are_one_an_image_with_seeds_that_depend_on_nothing_else() -> None:
    counts = {"seen": {"count": 2}}
    small = config(choice={"prompts": counts}, test={"prompts": counts}, best_of={"prompts": counts})
    grammar = load_grammar("shapes")
    rows = evaluation_rows(small, grammar, seed=0)
    assert rows.groupby("group").size().to_dict() == {"best_of": 32, "choice": 8, "test": 8}
    assert not rows.duplicated(["group", "prompt", "seed"]).any()
    assert rows["seed"].between(0, 2**31 - 1).all()
    assert rows.equals(evaluation_rows(small, grammar, seed=0))
    assert set(rows["seed"]).isdisjoint(evaluation_rows(small, grammar, seed=1)["seed"])
    wider = config(
        choice={"prompts": counts},
        test={"prompts": {"seen": {"count": 3, "colour": 1}}},
        best_of={"prompts": counts},
    )
    more = evaluation_rows(wider, grammar, seed=0)
    assert {*rows.itertuples(index=False)} < {*more.itertuples(index=False)}


def test_too_few_prompts_say_how_many_there_are() -> None:
    counts = {"unseen_object": {"count": 3}}  # the held-out object has four counts
    with pytest.raises(PromptError, match="has 1 that are not used"):
        draw_prompts(
            config(choice={"prompts": counts}, test={"prompts": counts}), load_grammar("shapes"), seed=0
        )


def test_reserved_prompts_are_a_third_that_only_confirmations_see() -> None:
    grammar = load_grammar("shapes")
    prompts = grammar.all_prompts()
    assert sum(map(is_reserved, prompts)) / len(prompts) == pytest.approx(1 / 3, abs=0.04)
    few = {"seen": {"combination": 20}, "unseen_object": {"combination": 15}}
    sections = {"choice": {"prompts": few}, "test": {"prompts": few}, "best_of": {"prompts": few}}
    for reserved, share in (("none", {False}), ("only", {True}), ("any", {False, True})):
        drawn = draw_prompts(config(reserved_prompts=reserved, **sections), grammar, seed=3)
        assert {is_reserved(prompt) for group in drawn.values() for prompt in group} == share
    with pytest.raises(PromptError, match=r"evaluate\.test\.prompts: .*not used elsewhere"):
        draw_prompts(
            config(reserved_prompts="only", **{**sections, "test": {"prompts": {"seen": {"count": 12}}}}),
            grammar,
            seed=3,
        )
