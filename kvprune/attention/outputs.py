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
    # Whatever kind of layer it is: transposed, quantized, with adapters.
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    units = torch.eye(query_heads * dim, dtype=dtype, device=weight.device)
    return (projection(units) - projection(torch.zeros_like(units[:1]))).unflatten(0, (query_heads, dim))


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

    A plain linear layer is read whenever it is asked for; what another makes of unit vectors is remembered.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        """module: of the layer's attention, which is not kept alive. Raises UnsupportedModelError."""
        self._projection = weakref.ref(output_projection(module))
        self._remembered: Tensor | None = None

    def sizes(self, values: Tensor, query_heads: int) -> Tensor:
        """L1 norm of what each value adds to the output, mean over query heads, `[B, Hkv, S]` float32.

        values: `[B, Hkv, S, Dv]`. query_heads: of this process.
        """
        rows = self._rows(query_heads, values.shape[3])
        return output_sizes(rows, values.to(rows.device)).to(values.device)

    def _rows(self, query_heads: int, dim: int) -> Tensor:
        if self._remembered is not None:
            return self._remembered
        projection = self._projection()
        if projection is None:
            raise PolicyError("the model of this cache is gone, and values are weighed by it: keep it with the cache.")
        rows = output_rows(projection, query_heads, dim)
        if type(projection) is not torch.nn.Linear:
            self._remembered = rows
        return rows


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
