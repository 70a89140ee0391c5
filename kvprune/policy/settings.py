"""What settings of policies must be: each of these raises PolicyError with what to write instead."""

from __future__ import annotations

import numbers

from kvprune.errors import PolicyError
from kvprune.state import MOST_TOKENS


def check_count(name: str, value: int, *, least: int, most: int = MOST_TOKENS) -> None:
    """Raise PolicyError unless a setting is an int of at least `least`, and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise PolicyError(f"{name} must be an int of at least {least}, not {value!r}.")
    if value > most:
        raise PolicyError(f"{name} must be an int of at most {most}, not {value!r}.")


def check_seed(seed: int) -> None:
    """Raise PolicyError unless a seed is an int of 64 bits."""
    check_count("seed", seed, least=0, most=2**64 - 1)


def check_number(name: str, value: float, *, low: float, high: float) -> None:
    """Raise PolicyError unless a setting is a number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= value <= high:
        raise PolicyError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}.")


def check_flag(name: str, value: bool) -> None:
    """Raise PolicyError unless a setting is True or False."""
    if not isinstance(value, bool):
        raise PolicyError(f"{name} must be True or False, not {value!r}.")


def check_kernel(kernel_size: int) -> None:
    """Raise PolicyError unless a kernel size is odd."""
    check_count("kernel_size", kernel_size, least=1)
    if kernel_size % 2 == 0:
        raise PolicyError(
            f"kernel_size must be odd, so that a window has a middle: write {kernel_size + 1}, not {kernel_size}."
        )


def check_reach(kernel_size: int, ahead: int | None) -> None:
    """Raise PolicyError unless a kernel has a middle, or `ahead` positions after what it is around."""
    if ahead is None:
        check_kernel(kernel_size)
        return
    check_count("kernel_size", kernel_size, least=1)
    check_count("ahead", ahead, least=0)
    if ahead >= kernel_size:
        raise PolicyError(f"ahead={ahead} is beyond kernel_size={kernel_size}: write kernel_size={ahead + 1} or more.")
