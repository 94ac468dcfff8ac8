"""How close images are to real ones, and how varied: distances between sets of features.

Both distances depend on the feature extractor, so a report names it, and are only compared at the same
number of images: the Fréchet distance is biased upwards when there are few. KID is unbiased, and so may be
below zero.

Shapes: N images, M real images, D features, P prompts.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from accord.evaluation.statistics import Bootstrap, Floats, Interval, bootstrap_interval, cluster_codes

_BLOCK = 2048  # rows of a kernel matrix at a time: bounds the memory at large sets


@dataclass(frozen=True, eq=False)
class Reference:
    """Features of real images, with what is the same in every comparison computed once."""

    features: NDArray[np.float32]
    """features_MD"""

    def frechet(self, features_ND: ArrayLike) -> float:
        """See `frechet_distance`."""
        features = np.asarray(features_ND, dtype=float)
        if len(features) < 2 or len(self.features) < 2:
            return float("nan")
        return self.frechet_to_gaussian(features.mean(axis=0), _covariance(features))

    def frechet_to_gaussian(self, mean_D: Floats, covariance_DD: Floats) -> float:
        """|m - m_r|^2 + tr(S + S_r - 2 (S_r^1/2 S S_r^1/2)^1/2).

        Symmetric inside, so the spectrum is real.
        """
        own_mean_D, own_covariance_DD, own_root_DD = self._gaussian
        product_DD = own_root_DD @ covariance_DD @ own_root_DD
        spectrum_D = np.linalg.eigvalsh((product_DD + product_DD.T) / 2.0)
        overlap = np.sqrt(np.clip(spectrum_D, 0.0, None)).sum()
        shift = float(((mean_D - own_mean_D) ** 2).sum())
        return max(0.0, shift + float(np.trace(covariance_DD) + np.trace(own_covariance_DD) - 2.0 * overlap))

    def kid(self, features_ND: ArrayLike) -> float:
        """See `kid`."""
        features = np.asarray(features_ND, dtype=float)
        n, m = len(features), len(self.features)
        if n < 2 or m < 2:
            return float("nan")
        across = _kernel_sum(features, np.asarray(self.features, dtype=float)) / (n * m)
        return _within(features) + self._within - 2.0 * across

    def frechet_influence(self, features_ND: ArrayLike) -> Floats:
        """influence_N: how the Fréchet distance changes with the weight of each image, to first order.

        Their mean is 0. The distance of a weighted set is about `frechet` plus the weighted mean of
        these, so that resampling needs no new decomposition. By the mean its derivative is 2 (m - m_r),
        by the covariance S it is I - T, where T = S_r^1/2 (S_r^1/2 S S_r^1/2)^-1/2 S_r^1/2 is the optimal
        transport from the one Gaussian to the other.
        """
        features = np.asarray(features_ND, dtype=float)
        if len(features) < 2 or len(self.features) < 2:
            return np.full(len(features), np.nan)
        own_mean_D, _, own_root_DD = self._gaussian
        centred_ND = features - features.mean(axis=0)
        product_DD = own_root_DD @ _covariance(features) @ own_root_DD
        values_D, vectors_DD = np.linalg.eigh((product_DD + product_DD.T) / 2.0)
        # Directions that the images do not span have no derivative: they are left out.
        spanned_D = values_D > 1e-8 * max(values_D[-1], 0.0)
        inverse_root_D = np.where(spanned_D, 1.0 / np.sqrt(np.where(spanned_D, values_D, 1.0)), 0.0)
        transport_DD = own_root_DD @ (vectors_DD * inverse_root_D) @ vectors_DD.T @ own_root_DD
        by_mean_N = 2.0 * centred_ND @ (features.mean(axis=0) - own_mean_D)
        by_covariance_N = (centred_ND**2).sum(axis=1) - ((centred_ND @ transport_DD) * centred_ND).sum(axis=1)
        unbiased = len(features) / (len(features) - 1)  # as the covariance is
        influence_N: Floats = by_mean_N + unbiased * (by_covariance_N - by_covariance_N.mean())
        return influence_N

    @cached_property
    def _gaussian(self) -> tuple[Floats, Floats, Floats]:
        features = np.asarray(self.features, dtype=float)
        covariance_DD = _covariance(features)
        values_D, vectors_DD = np.linalg.eigh(covariance_DD)
        root_DD = (vectors_DD * np.sqrt(np.clip(values_D, 0.0, None))) @ vectors_DD.T
        return features.mean(axis=0), covariance_DD, root_DD

    @cached_property
    def _within(self) -> float:
        return _within(np.asarray(self.features, dtype=float))


def frechet_distance(features_ND: ArrayLike, features_MD: ArrayLike) -> float:
    """The Fréchet distance of the Gaussians fitted to two sets (Heusel et al. 2017, equation 6).

    NaN below two rows.
    """
    return Reference(np.asarray(features_MD)).frechet(features_ND)


def kid(features_ND: ArrayLike, features_MD: ArrayLike) -> float:
    """The unbiased squared MMD with the kernel (x.y / D + 1)^3 (Bińkowski et al. 2018); NaN below two rows.

    All images are used at once, which has less variance than the mean over random subsets, and no seed.
    """
    return Reference(np.asarray(features_MD)).kid(features_ND)


def diversity_by_prompt(features_ND: ArrayLike, prompts: ArrayLike) -> tuple[Floats, NDArray[np.str_]]:
    """(distance_P, prompt_P), by prompt.

    For each prompt with two images or more, the mean distance between two of them.
    """
    features = np.asarray(features_ND, dtype=float)
    names_N = np.asarray(prompts, dtype=str)
    codes_N, num_prompts = cluster_codes(names_N)
    order = np.argsort(codes_N, kind="stable")
    bounds = np.searchsorted(codes_N[order], np.arange(num_prompts + 1))
    distances, names = [], []
    for begin, end in pairwise(bounds):
        if end - begin < 2:
            continue
        rows = order[begin:end]
        first, second = np.triu_indices(end - begin, k=1)
        gaps = features[rows][first] - features[rows][second]
        distances.append(float(np.sqrt((gaps**2).sum(axis=1)).mean()))
        names.append(names_N[rows[0]])
    return np.array(distances, dtype=float), np.array(names, dtype=str)


def diversity(features_ND: ArrayLike, prompts: ArrayLike, *, bootstrap: Bootstrap | None = None) -> Interval:
    """The mean distance between images of the same prompt, over prompts; n is the number of prompts."""
    distance_P, prompt_P = diversity_by_prompt(features_ND, prompts)
    return bootstrap_interval(distance_P, prompt_P, bootstrap=bootstrap, support=None)


def _covariance(features_ND: Floats) -> Floats:
    covariance_DD: Floats = np.atleast_2d(np.cov(features_ND, rowvar=False))
    return covariance_DD


def _within(features_ND: Floats) -> float:
    """The mean kernel of two different rows."""
    n, d = features_ND.shape
    diagonal = float((((features_ND**2).sum(axis=1) / d + 1.0) ** 3).sum())
    total = _kernel_sum(features_ND, features_ND)
    return (total - diagonal) / float(n * (n - 1))


def _kernel_sum(first_ND: Floats, second_MD: Floats) -> float:
    d = first_ND.shape[1]
    total = 0.0
    for begin in range(0, len(first_ND), _BLOCK):
        base = first_ND[begin : begin + _BLOCK] @ second_MD.T / d + 1.0
        total += float((base * base * base).sum())  # ten times as fast as a power
    return total
