"""What a value becomes in the output of its layer, and the size of what a query came from."""

from __future__ import annotations

import torch
from torch import Tensor

from kvprune.errors import UnsupportedModelError

_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")


def output_projection(module: torch.nn.Module) -> torch.nn.Module:
    """That of an attention module. Raises UnsupportedModelError where it has none of a known name."""
    children = dict(module.named_children())
    found = next((children[name] for name in _NAMES if name in children), None)
    if found is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no output projection of a known name ({', '.join(_NAMES)}), by which values "
            "could be weighed: use KVzip, which needs none."
        )
    return found


def output_norms(module: torch.nn.Module, values: Tensor, query_heads: int) -> Tensor:
    """Norm of what each query head would make of each value in the output, `[B, Hkv, G, S]` float32.

    values: `[B, Hkv, S, Dv]`.
    """
    heads, dim = values.shape[1], values.shape[3]
    projection = output_projection(module)
    weight = next(projection.parameters())
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    # What it makes of unit vectors are its rows, whatever kind of layer it is: transposed, quantized, with adapters.
    units = torch.eye(query_heads * dim, dtype=dtype, device=weight.device)
    rows = (projection(units) - projection(torch.zeros_like(units[:1]))).float().to(values.device)
    rows = rows.view(heads, query_heads // heads, dim, -1)
    grams = rows @ rows.transpose(2, 3)  # |W v|^2 = v (W^T W) v
    loose = values.float()
    by_head = [((loose @ grams[:, member]) * loose).sum(-1) for member in range(grams.shape[1])]
    return torch.stack(by_head, dim=2).clamp_(min=0).sqrt_()
