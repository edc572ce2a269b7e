"""One flag per image: which images a network classifies correctly, and how sure their share is."""

import math

from torch import Tensor


def flags_text(correct: Tensor) -> str:
    """(N,) bool as N characters, 1 where it is true: small, and readable in a JSON file."""
    return "".join("01"[flag] for flag in correct.tolist())


def wilson_interval(correct: int, examples: int) -> tuple[float, float]:
    """95 % interval of the accuracy behind `correct` of `examples` images, for images drawn at random.

    Unlike the textbook interval it stays within [0, 1] and does not shrink to nothing at 0 and 1.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    z = 1.959964
    share, scale = correct / examples, 1 + z**2 / examples
    middle = (share + z**2 / (2 * examples)) / scale
    half = z * math.sqrt(share * (1 - share) / examples + z**2 / (4 * examples**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)
