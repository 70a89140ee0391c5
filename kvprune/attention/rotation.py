"""`Rotation`: keys that a model turned by their position, turned on to the position that they have in the cache.

Rotary attention sees the distance between a query and a key alone. Where rows have gone, keys before the gap are as far
from the newest query as they were in the text. Turned by the number of positions that are missing after them, they are
as far as if the rows that are left stood side by side, at positions 0, 1, 2, ... of the cache, with the query behind.
The keys in the table stay as the model made them, so nothing drifts, and a scale that the model gave
them is not given twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """How a layer turns its keys: the first `2 * len(frequencies)` channels, in pairs.

    frequencies: angle per position of each pair, in radians, `[R]` float32. interleaved: whether the channels of a pair
    stand side by side, as in GPT-J; else one is in the first half of those that turn, one in the second, as in Llama.
    """

    frequencies: Tensor
    interleaved: bool = False

    def on(self, device: torch.device) -> Rotation:
        """The same for keys there, which need not be where the frequencies are."""
        return replace(self, frequencies=self.frequencies.to(device))

    def turned(self, keys: Tensor, by: Tensor) -> Tensor:
        """Keys `[..., D]` turned by so many positions, `[...]`, in their dtype."""
        frequencies = self.frequencies.to(keys.device)
        angles = by[..., None].to(frequencies.dtype) * frequencies
        cos, sin = angles.cos(), angles.sin()
        turning, rest = keys.split([2 * len(frequencies), keys.shape[-1] - 2 * len(frequencies)], dim=-1)
        pairs = turning.unflatten(-1, (-1, 2) if self.interleaved else (2, -1)).to(cos.dtype)
        a, b = pairs.unbind(-1 if self.interleaved else -2)
        result = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1 if self.interleaved else -2)
        return torch.cat([result.flatten(-2).to(keys.dtype), rest], dim=-1)

    def closed_up(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys `[B, Hkv, S, D]` of rows at these positions `[B, Hkv, S]`, as if none were missing between them.

        Positions are in any order, -1 for empty rows. Keys with no gap behind them are what they were, bit by bit.
        """
        missing = missing_after(positions)
        if keys.device.type == "cpu" and not torch.compiler.is_compiling():
            most = int((missing > 0).sum(-1).max()) if missing.numel() else 0  # few: the sinks, and what is far behind
            if most <= missing.shape[2] // 2:
                if not most:
                    return keys
                by, slots = missing.topk(most, dim=-1)
                index = slots[..., None].expand(-1, -1, -1, keys.shape[3])
                return keys.scatter(2, index, self.turned(keys.gather(2, index), by))
        return torch.where(missing[..., None] > 0, self.turned(keys, missing), keys)


def missing_after(positions: Tensor) -> Tensor:
    """How many positions behind each row, up to the newest of its head, no row has: int64 `[B, Hkv, S]`; 0 if empty.

    positions: `[B, Hkv, S]`, all different, but for -1 of empty rows.
    """
    rows = positions.shape[2]
    order = positions.argsort(dim=-1)
    after = torch.arange(rows - 1, -1, -1, device=positions.device).expand_as(order)
    after = torch.empty_like(order).scatter_(2, order, after)
    missing = positions.amax(-1, keepdim=True) - positions - after if rows else after
    return missing.masked_fill(positions < 0, 0)
