"""All numbers of a comparison in one dictionary: what summary.json holds and the report shows.

Every estimate is {value, low, high, n}: n counts what it was estimated from, low and high bound its interval
by resampling prompts. What could not be estimated is null, with n = 0. Keys, where MODEL is base, control or
aligned and SPLIT is seen, unseen_combination or unseen_object:

guidance.MODEL                the scale chosen on the "choice" prompts; claims are made on other prompts
success.MODEL.SPLIT.CATEGORY  share of images that fit, by the evaluator; CATEGORY also "overall"
gain.MODEL.SPLIT.CATEGORY     success above the base's on the same prompts; SPLIT also "all"
net_win.QUESTION.SPLIT        (wins - losses) / sets for alignment and fidelity; with wins, losses, ties
best_of.MODEL.N               success of the highest reward of N; with perfect, that of a perfect reward
SCORE.SPLIT                   how reward, reward_no_auxiliary and clip rank held-out labelled images
reward_gain.SCORE.SPLIT       AUC within categories of the reward above that of another score
fidelity.MODEL                frechet, kid, n, features
diversity.MODEL               mean distance in features between images of one prompt
readable.MODEL                share of readable images
change.MODEL                  diversity, readable and frechet above the base's
frontier                      one entry for each model and guidance scale, on the "choice" prompts
frontier_gain.MODEL           success above the base's at equal guidance, and at equal Fréchet distance
feedback, raters (who judged, and how much they agree), labels (how many are true),
calibration (of the reward, where it was fitted),
agreement (judge and evaluator), protocol, digests, seconds.STAGE, verdict
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from accord.errors import AccordError
from accord.evaluation.bestof import best_of_interval
from accord.evaluation.config import EvaluateConfig
from accord.evaluation.fidelity import Reference, diversity, diversity_by_prompt
from accord.evaluation.guidance import choose_guidance, frontier_gain, frontier_table
from accord.evaluation.plan import BEST_OF, CHOICE, TEST
from accord.evaluation.protocols import QUESTIONS
from accord.evaluation.reward_quality import label_quality, reward_quality
from accord.evaluation.statistics import Bootstrap, bootstrap_interval, difference_interval, kappa
from accord.evaluation.verdict import compute_verdict
from accord.evaluation.votes import tally
from accord.prompts import Category, Split

__all__ = ["MEASUREMENT_COLUMNS", "MODELS", "VOTE_COLUMNS", "build_summary", "compute_verdict", "plain"]

MODELS = ("base", "control", "aligned")
MEASUREMENT_COLUMNS = (
    *("group", "model", "guidance", "prompt", "category", "split", "seed", "image"),
    *("success", "readable", "fits", "reward", "reward_no_auxiliary", "clip"),
)
VOTE_COLUMNS = ("question", "prompt", "category", "split", "rater", "vote")
_TEST_COLUMNS = ("model", "split", "category", "prompt", "success", "readable")
_DIGITS = 6


@dataclass(frozen=True, eq=False)
class _Test:
    """The test rows, each model at its own guidance scale, and their features."""

    rows: pd.DataFrame
    features: NDArray[np.float32]
    bootstrap: Bootstrap

    def of(self, model: str, split: str = "all", category: str = "overall") -> pd.DataFrame:
        rows = self.rows[self.rows["model"] == model]
        rows = rows if split == "all" else rows[rows["split"] == split]
        return rows if category == "overall" else rows[rows["category"] == category]

    def features_of(self, model: str) -> NDArray[np.float32]:
        return self.features[(self.rows["model"] == model).to_numpy()]


def build_summary(
    measurements: pd.DataFrame,
    features_ND: NDArray[np.float32],
    reference_MD: NDArray[np.float32],
    *,
    votes: pd.DataFrame | None,
    feedback: Mapping[str, Any],
    reward_rows: pd.DataFrame | None,
    digests: Mapping[str, str],
    seconds: Mapping[str, float],
    config: EvaluateConfig,
    seed: int,
    feature_name: str,
    raters: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The summary of a comparison: plain JSON values only, the same for the same input and seed.

    Args:
        measurements: one row an image, with MEASUREMENT_COLUMNS. "choice" rows at every guidance scale;
            "test" rows at least at each model's best one (see `choose_guidance`); "best_of" rows at one scale
            a model.
        features_ND: the evaluator's features, aligned with the rows by position.
        reference_MD: the same features of held-out real images.
        votes: one row a vote, with VOTE_COLUMNS: +1 for the aligned model's set, -1 for the base's, 0 for
            neither.
        feedback: good, bad and skip shares by category, as the store counts them (the paper's table 2).
        reward_rows: held-out labelled images: prompt, category, split, label, reward, reward_no_auxiliary,
            clip.
        feature_name: what the features are, for the report.
        raters: who judged; see `accord.feedback.snapshot.snapshot_raters`.
        calibration: of the reward on images that learning left out; see
            `accord.reward.calibration.calibration_report`.

    Raises:
        AccordError: for missing columns, unaligned features, a prompt on which both guidance was chosen and a
            claim would be made, or no test images at a chosen scale.
    """
    check_measurements(measurements, features_ND)
    bootstrap = Bootstrap(seed, config.bootstrap_resamples, config.confidence_level)
    reference = Reference(np.asarray(reference_MD))
    frontier = frontier_table(measurements, features_ND, reference, bootstrap=bootstrap)
    guidance = choose_guidance(frontier)
    chosen = _at_chosen_guidance(measurements, guidance)
    # As categories, because every cell of the tables below compares these columns with a name.
    names = dict.fromkeys(("model", "split", "category"), "category")
    test = _Test(measurements.loc[chosen, list(_TEST_COLUMNS)].astype(names), features_ND[chosen], bootstrap)
    tuned = [model for model in MODELS if model != "base"]
    summary: dict[str, Any] = {
        "guidance": {model: guidance.get(model, float("nan")) for model in MODELS},
        "success": {model: _success(test, model) for model in MODELS},
        "gain": {model: _gain(test, model) for model in tuned},
        "net_win": _net_wins(votes, config.test.quorum, bootstrap),
        "best_of": {
            model: _best_of(measurements, model, config.best_of.sizes, bootstrap)
            for model in ("base", "aligned")
        },
        **reward_quality(reward_rows, bins=config.calibration_bins, bootstrap=bootstrap),
        "fidelity": {model: _fidelity(test, model, reference, feature_name) for model in MODELS},
        "diversity": {
            model: diversity(test.features_of(model), test.of(model)["prompt"], bootstrap=bootstrap).as_dict()
            for model in MODELS
        },
        "readable": {model: _mean(test.of(model), "readable", bootstrap) for model in MODELS},
        "change": {model: _change(test, model, reference) for model in tuned},
        "frontier": [point.as_dict() for point in frontier],
        "frontier_gain": {
            model: frontier_gain(
                measurements, features_ND, reference, frontier, model, bootstrap=bootstrap
            ).as_dict()
            for model in tuned
        },
        "feedback": feedback,
        "raters": raters or {},
        "calibration": calibration or {},
        "labels": label_quality(reward_rows, bootstrap=bootstrap),
        "agreement": _agreement(measurements, bootstrap),
        "protocol": _protocol(test, config, seed),
        "digests": digests,
        "seconds": seconds,
    }
    summary = plain(summary)
    return {**summary, "verdict": compute_verdict(summary)}


def check_measurements(measurements: pd.DataFrame, features_ND: NDArray[np.float32]) -> None:
    """Raises AccordError for what would make the comparison wrong or impossible."""
    missing = [name for name in MEASUREMENT_COLUMNS if name not in measurements.columns]
    if missing:
        raise AccordError(f"the measurements lack the columns {', '.join(missing)}")
    if len(measurements) != len(features_ND):
        raise AccordError(
            f"there are {len(measurements)} measurements but {len(features_ND)} feature rows; one each"
        )
    if not np.isfinite(features_ND).all():
        raise AccordError("the evaluator's features are not finite; measure these images again")
    known = {
        "model": MODELS,
        "group": (CHOICE, TEST, BEST_OF),
        "split": tuple(Split),
        "category": tuple(Category),
    }
    for column, names in known.items():
        unknown = sorted(set(measurements[column].astype(str)) - set(names))
        if unknown:
            raise AccordError(
                f"the measurements have the {column} {unknown[0]!r}; known are {', '.join(names)}"
            )
    for column in ("success", "readable", "guidance"):
        if measurements[column].isna().any():
            raise AccordError(
                f"the measurements have no {column} in {int(measurements[column].isna().sum())} rows"
            )
    keys = ["group", "model", "guidance", "prompt", "seed"]
    if measurements.duplicated(keys).any():
        raise AccordError(
            "the measurements hold an image twice: same group, model, guidance, prompt and seed"
        )
    by_group = {group: set(rows["prompt"]) for group, rows in measurements.groupby("group")}
    for group in (TEST, BEST_OF):
        both = sorted(by_group.get(CHOICE, set()) & by_group.get(group, set()))
        if both:
            raise AccordError(
                f"{len(both)} prompts are in the groups {CHOICE!r} and {group!r}, such as {both[0]!r}: "
                "guidance must be chosen on other prompts than those of the claim"
            )


def plain(value: Any) -> Any:
    """`value` as JSON has it: floats rounded to 6 digits, NaN and infinity as None, keys as text."""
    if isinstance(value, Mapping):
        return {str(key.value if isinstance(key, Enum) else key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        # Adding zero makes -0.0 into 0.0.
        return round(float(value), _DIGITS) + 0.0 if np.isfinite(value) else None
    return value


def _at_chosen_guidance(measurements: pd.DataFrame, guidance: Mapping[str, float]) -> NDArray[np.bool_]:
    """Which rows are test rows of a model at its chosen scale."""
    test = measurements["group"] == TEST
    scale = measurements["model"].map(guidance).astype(float)
    chosen: NDArray[np.bool_] = (test & (measurements["guidance"].astype(float) == scale)).to_numpy(
        dtype=bool
    )
    for model in sorted(set(measurements.loc[test, "model"])):
        if not (chosen & (measurements["model"] == model).to_numpy()).any():
            there = sorted(set(measurements.loc[test & (measurements["model"] == model), "guidance"]))
            raise AccordError(
                f"{model}: there are no test images at its chosen guidance scale {guidance.get(model)}, "
                f"but at {there}"
            )
    return chosen


def _mean(rows: pd.DataFrame, column: str, bootstrap: Bootstrap) -> dict[str, Any]:
    return bootstrap_interval(rows[column], rows["prompt"], bootstrap=bootstrap).as_dict()


def _cells() -> tuple[str, ...]:
    return ("overall", *(str(category) for category in Category))


def _success(test: _Test, model: str) -> dict[str, Any]:
    return {
        str(split): {cell: _mean(test.of(model, split, cell), "success", test.bootstrap) for cell in _cells()}
        for split in Split
    }


def _gain(test: _Test, model: str) -> dict[str, Any]:
    def gain(split: str, cell: str) -> dict[str, Any]:
        rows, base = test.of(model, split, cell), test.of("base", split, cell)
        return difference_interval(
            rows["success"], rows["prompt"], base["success"], base["prompt"], bootstrap=test.bootstrap
        ).as_dict()

    return {
        split: {cell: gain(split, cell) for cell in _cells()} for split in ("all", *(str(s) for s in Split))
    }


def _change(test: _Test, model: str, reference: Reference) -> dict[str, Any]:
    rows, base = test.of(model), test.of("base")
    readable = difference_interval(
        rows["readable"], rows["prompt"], base["readable"], base["prompt"], bootstrap=test.bootstrap
    )
    varied = difference_interval(
        *diversity_by_prompt(test.features_of(model), rows["prompt"]),
        *diversity_by_prompt(test.features_of("base"), base["prompt"]),
        bootstrap=test.bootstrap,
        support=None,
    )
    # Influences have mean zero: shifted by the difference of the distances, they have it as their own.
    shift = reference.frechet(test.features_of(model)) - reference.frechet(test.features_of("base"))
    frechet = difference_interval(
        reference.frechet_influence(test.features_of(model)) + shift,
        rows["prompt"],
        reference.frechet_influence(test.features_of("base")),
        base["prompt"],
        bootstrap=test.bootstrap,
        support=None,
    )
    return {"readable": readable.as_dict(), "diversity": varied.as_dict(), "frechet": frechet.as_dict()}


def _fidelity(test: _Test, model: str, reference: Reference, feature_name: str) -> dict[str, Any]:
    features = test.features_of(model)
    return {
        "frechet": reference.frechet(features),
        "kid": reference.kid(features),
        "n": len(features),
        "reference_n": len(reference.features),
        "features": feature_name,
    }


def _net_wins(votes: pd.DataFrame | None, quorum: int, bootstrap: Bootstrap) -> dict[str, Any]:
    if votes is None:
        votes = pd.DataFrame({name: [] for name in VOTE_COLUMNS})
    missing = [name for name in VOTE_COLUMNS if name not in votes.columns]
    if missing:
        raise AccordError(f"the votes lack the columns {', '.join(missing)}")

    def net(question: str, split: str) -> dict[str, Any]:
        rows = votes[(votes["question"] == question) & (votes["split"] == split)]
        if rows.empty:
            return tally(np.zeros((0, 0)), quorum, bootstrap=bootstrap).as_dict()
        if rows.duplicated(["prompt", "rater"]).any():
            raise AccordError(
                f"a rater voted twice on the {question} of one prompt ({split}); one vote each counts"
            )
        return tally(
            rows.pivot(index="prompt", columns="rater", values="vote"), quorum, bootstrap=bootstrap
        ).as_dict()

    return {question: {str(split): net(question, split) for split in Split} for question in QUESTIONS}


def _best_of(
    measurements: pd.DataFrame, model: str, sizes: tuple[int, ...], bootstrap: Bootstrap
) -> dict[str, dict[str, Any]]:
    rows = measurements[(measurements["group"] == BEST_OF) & (measurements["model"] == model)]
    scales = sorted(set(rows["guidance"]))
    if len(scales) > 1:
        raise AccordError(
            f"best-of-n candidates of {model} are at several guidance scales ({scales}); use one"
        )
    if rows["reward"].isna().any():
        raise AccordError(
            f"best-of-n candidates of {model} lack a reward in {int(rows['reward'].isna().sum())} rows"
        )
    found = {}
    for n in sizes:
        interval, perfect = best_of_interval(
            rows["reward"], rows["success"], rows["prompt"], n, bootstrap=bootstrap
        )
        found[str(n)] = {**interval.as_dict(), "perfect": perfect, "guidance": scales[0] if scales else None}
    return found


def _agreement(measurements: pd.DataFrame, bootstrap: Bootstrap) -> dict[str, Any]:
    """How often the raters' rule-based judge and the evaluator say the same of a generated image."""
    rows = measurements[measurements["fits"].notna()]
    fits, success = rows["fits"].astype(bool), rows["success"].astype(bool)
    interval = bootstrap_interval((fits == success).astype(float), rows["prompt"], bootstrap=bootstrap)
    return {**interval.as_dict(), "kappa": kappa(fits, success)}


def _protocol(test: _Test, config: EvaluateConfig, seed: int) -> dict[str, Any]:
    return {
        "prompts": int(test.rows["prompt"].nunique()),
        "images": {model: len(test.of(model)) for model in MODELS},
        "images_per_prompt": config.test.images_per_prompt,
        "raters": config.test.raters,
        "quorum": config.test.quorum,
        "guidance_scales": list(config.guidance_scales),
        "confidence_level": config.confidence_level,
        "bootstrap_resamples": config.bootstrap_resamples,
        "seed": seed,
    }
