"""Types of flags: parsers for argparse, whose errors name the value and what is expected."""

import argparse
import math
from collections.abc import Callable
from typing import Any

from cifar100_models import check_model_name


def number(low: float = 0.0, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """A parser of numbers or fractions such as 8/255 in [low, high], or in (low, high] with `above`."""
    limits = f" above {low:g}" if above else f" from {low:g}" if math.isfinite(low) else ""
    limits += f" up to {high:g}" if math.isfinite(high) else ""

    def parse(text: str) -> float:
        numerator, slash, denominator = text.partition("/")
        try:
            parts = float(numerator), float(denominator if slash else 1)
            value = parts[0] / parts[1]
        except (ValueError, ZeroDivisionError):
            parts, value = (), math.nan
        finite = all(map(math.isfinite, (*parts, value)))
        if not finite or not low <= value <= high or (above and value == low):
            raise _not_allowed(text, f"a number{limits}, or a fraction such as 8/255")
        return value

    return parse


def whole(low: int) -> Callable[[str], int]:
    """A parser of whole numbers of at least `low` (and below 2**31)."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and len(text) <= 10 and low <= int(text) < 2**31):
            raise _not_allowed(text, f"a whole number from {low}")
        return int(text)

    return parse


fraction = number(0.0, 1.0)
positive_int = whole(1)


def switch(text: str) -> int:
    """A parser of 0 and 1."""
    if text not in ("0", "1"):
        raise _not_allowed(text, "0 or 1")
    return int(text)


def model_name(text: str) -> str:
    """A parser of the names that ``build_model`` takes; nothing is built."""
    try:
        check_model_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def run_name(text: str) -> str:
    """A parser of folder names."""
    if not text or text in (".", "..") or any(character in text for character in "/\\\0\n") or text.startswith("-"):
        raise _not_allowed(text, "a plain folder name without slashes")
    return text


def flag_like(value: Any) -> Callable[[str], Any]:
    """A parser of values of a default's type; of any number where the default is computed."""
    if callable(value):
        return number(-math.inf)
    return {bool: switch, int: whole(0), float: number(-math.inf)}.get(type(value), str)


def _not_allowed(text: str, expected: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{text!r} is not allowed; expected {expected}")
