"""What values become in the output of their layer: the part of its output projection that each query head has."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from kvprune.attention.mass import row_blocks
from kvprune.errors import PolicyError, UnsupportedModelError

_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")


def output_projection(module: torch.nn.Module) -> torch.nn.Module:
    """That of an attention module. Raises UnsupportedModelError where it has none of a known name."""
    children = dict(module.named_children())
    found = next((children[name] for name in _NAMES if name in children), None)
    if found is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no output projection of a known name ({', '.join(_NAMES)}), by which values "
            "could be weighed: choose a policy that weighs attention alone, such as KVzip or SnapKV."
        )
    return found


def output_rows(projection: torch.nn.Module, query_heads: int, dim: int) -> Tensor:
    """What an output projection makes of unit vectors of each query head, `[Hq, Dv, hidden]`."""
    weight = next(projection.parameters())
    if type(projection) is torch.nn.Linear and weight.device.type != "meta":
        weight = getattr(weight, "to_local", lambda: weight)()  # of tensor parallelism: the heads that are here
        return weight.detach().T.unflatten(0, (query_heads, dim))
    units = torch.eye(query_heads * dim, dtype=_numbers_of(weight), device=weight.device)
    return _without_bias(projection, units).unflatten(0, (query_heads, dim))


def _without_bias(projection: torch.nn.Module, inputs: Tensor) -> Tensor:
    """What a layer of whatever kind, transposed, quantized or with adapters, makes of inputs `[n, Hq * Dv]`."""
    return projection(inputs) - projection(torch.zeros_like(inputs[:1]))


def _numbers_of(weight: Tensor) -> torch.dtype:
    return weight.dtype if weight.dtype.is_floating_point else torch.float32


def output_norms(module: torch.nn.Module, values: Tensor, query_heads: int) -> Tensor:
    """L2 norm of what each query head would make of each value in the output, `[B, Hkv, G, S]` float32.

    values: `[B, Hkv, S, Dv]`.
    """
    rows = output_rows(output_projection(module), query_heads, values.shape[3]).float().to(values.device)
    grams = (rows @ rows.transpose(1, 2)).unflatten(0, (values.shape[1], -1))  # |W v|^2 = v (W^T W) v
    loose = values.float()
    by_head = [((loose @ grams[:, member]) * loose).sum(-1) for member in range(grams.shape[1])]
    return torch.stack(by_head, dim=2).clamp_(min=0).sqrt_()


class Outputs:
    """The output projection of one layer, for policies that weigh values by what they add to the output.

    It is read whenever it is asked for, and nothing of it is kept: adapters may be switched, and a cache would hold
    bytes that nobody counts. A layer that is not plain is asked for a few values themselves, for many of unit vectors.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        """module: of the layer's attention, which is not kept alive. Raises UnsupportedModelError."""
        self._projection = weakref.ref(output_projection(module))

    def sizes(self, values: Tensor, query_heads: int) -> Tensor:
        """L1 norm of what each value adds to the output, mean over query heads, `[B, Hkv, S]` float32.

        values: `[B, Hkv, S, Dv]`. query_heads: of this process.
        """
        projection = self._projection()
        if projection is None:
            raise PolicyError("the model of this cache is gone, and values are weighed by it: keep it with the cache.")
        few = values.shape[0] * values.shape[2] < values.shape[3]
        if few and type(projection) is not torch.nn.Linear:
            return _sizes_of_few(projection, values, query_heads)
        rows = output_rows(projection, query_heads, values.shape[3])
        return output_sizes(rows, values.to(rows.device)).to(values.device)


def _sizes_of_few(projection: torch.nn.Module, values: Tensor, query_heads: int) -> Tensor:
    """`Outputs.sizes` by letting each query head put each value through the layer, alone."""
    (batch, heads, length, dim), weight = values.shape, next(projection.parameters())
    apart = torch.zeros(
        batch, length, query_heads, query_heads, dim, dtype=_numbers_of(weight), device=weight.device
    )  # fmt: skip
    each = torch.arange(query_heads, device=apart.device)
    group = query_heads // heads
    apart[:, :, each, each] = values.repeat_interleave(group, dim=1).transpose(1, 2).to(apart)
    sizes = _without_bias(projection, apart.view(-1, query_heads * dim)).abs().sum(-1, dtype=torch.float32)
    return sizes.view(batch, length, heads, group).mean(-1).transpose(1, 2).to(values.device)


def output_sizes(rows: Tensor, values: Tensor) -> Tensor:
    """Mean over the query heads of a KV head of `|v W|_1`, `[B, Hkv, S]` float32.

    rows: W, `[Hq, Dv, hidden]`. values: `[B, Hkv, S, Dv]`.
    """
    batch, heads, length, _ = values.shape
    group = len(rows) // heads
    by_head = values.to(rows.dtype).transpose(0, 1)  # [Hkv, B, S, Dv]
    parts = []
    for block in row_blocks(length, batch * rows.shape[0] * rows.shape[2], values.device):
        some = by_head[:, :, block].flatten(1, 2).repeat_interleave(group, dim=0)
        sizes = torch.bmm(some, rows).abs_().sum(-1, dtype=torch.float32)
        parts.append(sizes.view(heads, group, batch, -1).mean(1))
    return torch.cat(parts, dim=2).transpose(0, 1)
