"""Schedules of cascades: pairs (depth, share), after what part of the layers which share of all tokens goes on.

Where tokens skip layers and come back, shares may rise again, and hold from one depth to the next.
"""

from __future__ import annotations

from itertools import pairwise

from kvprune.errors import PolicyError
from kvprune.policy.settings import check_number

Schedule = tuple[tuple[float, float], ...]


def checked(schedule: Schedule | str, *, falls: bool = True, name: str = "schedule") -> Schedule:
    """A schedule, also of text such as "0.5:0.7/0.9:0.3". falls: whether its shares may not rise, nor be 0.
    name: of the setting, for errors.

    Raises PolicyError for one without meaning.
    """
    example = "write pairs of a depth and a share such as ((0.5, 0.7), (0.9, 0.3))"
    try:
        if isinstance(schedule, str):
            schedule = tuple(tuple(map(float, pair.split(":"))) for pair in schedule.split("/"))  # type: ignore[misc]
        pairs = tuple((depth, share) for depth, share in schedule)
    except (TypeError, ValueError):
        raise PolicyError(f"{name} cannot be {schedule!r}: {example}.") from None
    for depth, share in pairs:
        check_number("a depth of the schedule", depth, low=0, high=1)
        check_number("a share of the schedule", share, low=0, high=1)
    what = "heads" if name == "heads" else "tokens"
    for (depth, share), (deeper, less) in pairwise(pairs):
        if not depth < deeper:
            raise PolicyError(f"depths of a schedule ascend, and {deeper} comes after {depth}: {example}.")
        if falls and less > share:
            raise PolicyError(
                f"no more {what} can go on than came, and a share of {less} after {deeper:g} of the layers is more "
                f"than the {share} before: let shares fall, as in ((0.5, 0.7), (0.9, 0.3))."
            )
    if falls and any(share == 0 for _, share in pairs):
        raise PolicyError(f"a share of the schedule must be above 0, and {schedule!r} has 0.")
    return tuple((float(depth), float(share)) for depth, share in pairs)


def share_after(schedule: Schedule, layer: int, layers: int) -> float | None:
    """The share of tokens that goes on after a layer, of so many; None if all that it looks at do."""
    shares = [share for depth, share in schedule if max(1, round(depth * layers)) == layer + 1]
    return min(shares) if shares and layer + 1 < layers else None


def share_at(schedule: Schedule, layer: int, layers: int) -> float:
    """The share that holds at a layer, of so many: that of the last depth up to it; 0 before the first."""
    return next((share for depth, share in reversed(schedule) if round(depth * layers) <= layer), 0.0)
