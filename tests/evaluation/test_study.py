"""Intervals over seeds, against arithmetic and tables; the page is made of the numbers alone."""

import copy
import math
import xml.etree.ElementTree
from typing import Any

import numpy as np
import pytest

from accord.evaluation.study import build_study, candidates_for, compare_arms, seeds_interval
from accord.evaluation.study_page import study_page
from tests.evaluation.report_example import example_summary


def summary(gain: float, frechet: float = 1.0) -> dict[str, Any]:
    found = copy.deepcopy(example_summary())
    found["gain"]["aligned"]["all"]["overall"]["value"] = gain
    found["fidelity"]["aligned"]["frechet"] = frechet * found["fidelity"]["base"]["frechet"]
    return found


def test_interval_over_seeds_by_hand() -> None:
    # mean 3, standard deviation sqrt(2.5), t(0.975, 4) = 2.776
    found = seeds_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451 * math.sqrt(2.5 / 5)
    assert (found.value, found.n) == (3.0, 5)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half))


def test_interval_of_few_seeds() -> None:
    assert seeds_interval([]).n == 0
    one = seeds_interval([0.3, float("nan")])
    assert (one.value, one.n) == (0.3, 1)
    assert math.isnan(one.low)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(2_000):
        found = seeds_interval(list(generator.normal(0.1, 0.05, 5)))
        hits += found.low <= 0.1 <= found.high
    assert hits / 2_000 == pytest.approx(0.95, abs=0.015)


def test_candidates_for_a_goal() -> None:
    curve = {1: 0.4, 4: 0.7, 16: 0.9}
    assert candidates_for(curve, 0.3) == 1.0
    assert candidates_for(curve, 0.5) == pytest.approx(2.0)
    assert candidates_for(curve, 0.8) == pytest.approx(10.0)
    assert candidates_for(curve, 0.95) == math.inf
    assert math.isnan(candidates_for({}, 0.5))


def test_arms_are_paired_by_seed() -> None:
    study = build_study(
        {
            "a": {1: summary(0.10), 2: summary(0.30)},
            "b": {1: summary(0.05), 2: summary(0.21), 3: summary(0.9)},
        }
    )
    found = compare_arms(study, "a", "b", "gain.all")
    assert (found.value, found.n) == (pytest.approx(0.07), 2)
    assert study["a"]["gain.all"]["seeds"] == {"1": 0.10, "2": 0.30}
    assert study["b"]["gain.all"]["n"] == 3


def test_the_page_shows_every_arm_with_its_interval_and_draws_it() -> None:
    study = build_study(
        {
            "paper": {1: summary(0.10, 1.1), 2: summary(0.14, 1.3)},
            "signed": {1: summary(0.20, 0.9), 2: summary(0.22, 1.1)},
        }
    )
    page, pictures = study_page(study, {"paper": ["finetune.weighting=raw"], "signed": []})
    assert "| paper | +12.0 (−13.4 to +37.4) |" in page
    assert "| signed | +21.0 (+8.3 to +33.7) |" in page
    assert "| signed | +9.0 (−3.7 to +21.7) |" in page, "the difference of the arms, paired by seed"
    assert "| paper | 1.20 (−0.07 to 2.47) |" in page
    assert "- **paper**: `finetune.weighting=raw`\n- **signed**: nothing" in page
    assert set(pictures) == {"study-gains.svg", "study-trade.svg"}
    for picture in pictures.values():
        xml.etree.ElementTree.fromstring(picture)
        assert "paper" in picture
        assert "signed" in picture
    assert study_page(study, {})[1] == pictures, "the same numbers give the same pictures"
