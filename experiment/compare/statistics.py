"""How sure a gain is: an exact test per seed, an interval, and the seeds that a gain would need.

Runs that were attacked on the same images are paired. A difference is, per image, 1 where only the second run is
correct under attack, -1 where only the first is, and 0 elsewhere.
"""

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np

RESAMPLES = 4000
"""With this many, the ends of a 95 % interval move by some 3 % of its width from one random seed to another."""
CHUNK = 250
"""Resamples at a time: their draws stay below 20 MB each for 10,000 images."""


def mcnemar(differences: np.ndarray) -> float:
    """Two-sided p value of McNemar's exact test that two networks are correct under attack on equally many images.

    Source: McNemar, Psychometrika 1947; exact, as the binomial test of the images on which the two differ.
    """
    from scipy.stats import binomtest  # takes a second to import

    first_only, differing = int((differences == -1).sum()), int((differences != 0).sum())
    return float(binomtest(first_only, differing).pvalue) if differing else 1.0


def interval_of_gain(differences: np.ndarray, gains: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean gain: the wider of the bootstrap over seeds x images and Student's t over the gains."""
    bootstrap = bootstrap_interval(differences)
    if len(gains) == 1:
        return bootstrap
    from scipy.stats import sem, t

    mean, half = fmean(gains), float(t.ppf(0.975, len(gains) - 1) * sem(gains))
    return max(bootstrap, (mean - half, mean + half), key=lambda ends: ends[1] - ends[0])


def bootstrap_interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the mean of a table of seeds x images, both drawn anew with replacement.

    Source: Owen, The pigeonhole bootstrap, Annals of Applied Statistics 2007 (rows and columns drawn independently).
    """
    seeds, images = differences.shape
    generator = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES // CHUNK):
        of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=CHUNK) / seeds
        drawn = generator.integers(images, size=(CHUNK, images))
        means.append(np.take_along_axis(of_seeds @ differences, drawn, axis=1).mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def seeds_needed(gain: float, deviation: float, most: int = 1000) -> int | None:
    """Seeds, 2 up to `most`, with which a paired t test (two-sided, 5 %) finds a mean gain with a probability of 80 %.

    `deviation` is the standard deviation of the gain between seeds.
    """
    from scipy.stats import nct, t

    for n in range(2, most + 1):
        if deviation == 0:
            return n
        limit = float(t.ppf(0.975, n - 1))
        if 1 - float(nct.cdf(limit, n - 1, gain / deviation * math.sqrt(n))) >= 0.8:
            return n
    return None
