"""Simulated raters: their errors are as stated, and all they say is determined by seed and key."""

from __future__ import annotations

import numpy as np
import pytest

from accord.evaluation.protocols import KnowsTheTruth, Panel, Vote
from accord.prompts import Prompt, load_grammar
from accord.shapes.raters import RATERS, Rater, SimulatedPanel
from accord.shapes.scene import Scene, render

GOOD = render(Scene("star", "red", 2, "on grass", 5))
BLANK = np.full((64, 64, 3), 240, np.uint8)


@pytest.fixture(scope="module")
def prompt() -> Prompt:
    return load_grammar("shapes").parse("two red stars on grass")


def verdicts(panel: SimulatedPanel, image: np.ndarray, prompt: Prompt, n: int, k: int) -> list[list[Vote]]:
    return panel.judge([image] * n, [prompt] * n, [str(i) for i in range(n)], k)


def test_errors_come_at_the_stated_rate(prompt: Prompt) -> None:
    panel = SimulatedPanel(0, [Rater(name="careless", error_rate=0.2)])
    wrong = [votes[0].verdict == "bad" for votes in verdicts(panel, GOOD, prompt, 2_000, 1)]
    # Four standard errors of a share of 0.2 over 2,000 draws.
    assert np.mean(wrong) == pytest.approx(0.2, abs=4 * np.sqrt(0.2 * 0.8 / 2_000))


def test_the_truth_is_what_a_rater_says_who_makes_no_mistakes(prompt: Prompt) -> None:
    panel = SimulatedPanel(0, [Rater(name="careless", error_rate=1.0)])
    assert isinstance(panel, Panel)
    assert isinstance(panel, KnowsTheTruth)
    assert panel.truth([GOOD, BLANK], [prompt, prompt]) == [True, False]
    assert [votes[0].verdict for votes in panel.judge([GOOD], [prompt], ["key"], 1)] == ["bad"]


def test_only_unreadable_images_are_skipped(prompt: Prompt) -> None:
    panel = SimulatedPanel(0, [Rater(name="a", error_rate=0.0, skip_rate=0.5)])
    assert {v[0].verdict for v in verdicts(panel, GOOD, prompt, 50, 1)} == {"good"}
    assert {v[0].verdict for v in verdicts(panel, BLANK, prompt, 50, 1)} == {"bad", "skip"}


def test_an_image_is_judged_by_different_raters(prompt: Prompt) -> None:
    votes = verdicts(SimulatedPanel(0), GOOD, prompt, 60, 3)
    assert all(len({v.rater for v in image}) == 3 for image in votes)
    assert {v.rater for image in votes for v in image} == {r.name for r in RATERS}


def test_the_same_key_gives_the_same_votes_whatever_the_batch(prompt: Prompt) -> None:
    together = verdicts(SimulatedPanel(3), GOOD, prompt, 20, 3)
    alone = [SimulatedPanel(3).judge([GOOD], [prompt], [str(i)], 3)[0] for i in range(20)]
    assert together == alone
    assert verdicts(SimulatedPanel(4), GOOD, prompt, 20, 3) != together


def test_alignment_prefers_the_set_that_fits_and_is_antisymmetric(prompt: Prompt) -> None:
    panel = SimulatedPanel(0, [Rater(name=str(i), error_rate=0.0) for i in range(9)])
    assert panel.compare("alignment", prompt, [GOOD] * 4, [BLANK] * 4, "k") == [1] * 9
    assert panel.compare("alignment", prompt, [BLANK] * 4, [GOOD] * 4, "k") == [-1] * 9
    assert panel.compare("alignment", prompt, [GOOD] * 4, [GOOD] * 4, "k") == [0] * 9


def test_fidelity_prefers_real_renders_over_noise(prompt: Prompt) -> None:
    rng = np.random.default_rng(0)
    real = [render(Scene("heart", "blue", 1, "in the sky", seed)) for seed in range(4)]
    noisy = [np.clip(i + rng.normal(0, 60, i.shape), 0, 255).astype(np.uint8) for i in real]
    panel = SimulatedPanel(0)
    assert sum(panel.compare("fidelity", prompt, real, noisy, "k")) >= 7
    assert sum(panel.compare("fidelity", prompt, noisy, real, "k")) <= -7
