"""How sure a difference is: exact tests, intervals, and the seeds that a gain would need.

Runs that were attacked on the same images are paired: what counts is on which images they differ.
"""

import math
from collections.abc import Sequence
from statistics import stdev

import numpy as np

RESAMPLES = 4000
"""The ends of a 95 % interval from so many move by some 3 % of its width from one random seed to another."""
CHUNK = 250
"""Resamples at a time: their draws stay below 20 MB each for 10,000 images."""


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided p value of McNemar's exact test that two networks withstand equally many images.

    Args:
        first, second: per image, whether the network withstood; of the same images in the same order.

    Source: McNemar, Psychometrika 1947; exact, as the binomial test of the images on which the two differ.
    """
    from scipy.stats import binomtest  # takes a second to import

    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    differing = only_first + only_second
    return float(binomtest(only_first, differing).pvalue) if differing else 1.0


def bootstrap_interval(differences: Sequence[Sequence[int]], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of a table of seeds x images, both drawn anew with replacement.

    Args:
        differences: per seed and image the twin's flag minus the baseline's: -1, 0 or 1.
        seed: of the draws.

    Source: Owen, The pigeonhole bootstrap, Annals of Applied Statistics 2007 (rows and columns drawn independently).
    """
    table = np.asarray(differences, dtype=np.float64)
    seeds, images = table.shape
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES // CHUNK):
        of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=CHUNK) / seeds
        drawn = generator.integers(images, size=(CHUNK, images))
        means.append(np.take_along_axis(of_seeds @ table, drawn, axis=1).mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def t_half_width(values: Sequence[float]) -> float:
    """Half of Student's 95 % interval of the mean of two values or more."""
    from scipy.stats import t

    n = len(values)
    return float(t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n)


def unpaired_half_width(first: float, second: float, examples: int) -> float:
    """Half of the 95 % interval of the difference of two accuracies, where it is not known which images fell."""
    from experiment.evaluation import wilson_interval

    halves = []
    for accuracy in (first, second):
        low, high = wilson_interval(round(accuracy * examples), examples)
        halves.append((high - low) / 2)
    return math.hypot(*halves)


def seeds_needed(gain: float, deviation: float, most: int = 1000) -> int | None:
    """Seeds with which a paired t test (two-sided, 5 %) finds a mean gain with a probability of 80 %.

    Args:
        gain: the mean difference to be found, above 0.
        deviation: standard deviation of the differences between seeds, in the unit of `gain`.

    Returns:
        The number, 2 or more; None if `most` do not suffice.
    """
    from scipy.stats import nct, t

    for n in range(2, most + 1):
        if deviation == 0:
            return n
        limit = float(t.ppf(0.975, n - 1))
        if 1 - float(nct.cdf(limit, n - 1, gain / deviation * math.sqrt(n))) >= 0.8:
            return n
    return None
