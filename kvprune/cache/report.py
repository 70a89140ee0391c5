"""What a cache holds: measured bytes, kept tokens, and a picture of them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvprune.errors import CacheError


@dataclass(frozen=True)
class LayerReport:
    """One layer. Bytes are of tensors that exist; `dense_nbytes` is what a DynamicCache would hold."""

    index: int
    kind: str
    """"pruned", or the class of transformers' layer, such as "DynamicSlidingWindowLayer"."""
    nbytes: int
    kv_nbytes: int
    dense_nbytes: int
    positions: Tensor | None
    """Kept positions `[B, Hkv, rows]`, -1 for empty; None for a layer that is not pruned."""
    code_nbytes: int | None = None
    """The part of `kv_nbytes` that is codes, or keys and values in full precision; None where no row is packed."""
    half_nbytes: int | None = None
    """What `dense_nbytes` would be at 16 bits a number; None where no row is packed."""

    @property
    def ratio(self) -> float:
        """Bytes held for every byte of a dense layer; 1.0 for an empty one."""
        return self.nbytes / self.dense_nbytes if self.dense_nbytes else 1.0

    @property
    def rows(self) -> int | None:
        """Most tokens that a KV head of the layer keeps."""
        return None if self.positions is None else int((self.positions >= 0).sum(-1).max())


@dataclass(frozen=True)
class CacheReport:
    """`str(report)` is a table, `report.plot(path)` a picture, `report.to_dict()` plain data."""

    policy: str
    seen_tokens: int
    layers: tuple[LayerReport, ...]
    selected: list[Tensor] | None = None
    """For each sequence, the positions that a prompt filter chose, LongTensor `[k]`; None if nothing was filtered."""
    filter_layer: int | None = None
    """The layer by which a prompt filter chooses; None if there is no such filter."""
    kernels: str | None = None
    """What computes on the cache; None before its first tokens."""
    attention: str = "sdpa"
    """What attention over a prompt runs on: "sdpa", "flash" or "flash-attn"."""
    notes: tuple[str, ...] = ()
    """What else there is to know, such as a budget that was raised to what is always kept."""

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def kv_nbytes(self) -> int:
        """Bytes of keys and values alone, without positions, scores and remembered queries."""
        return sum(layer.kv_nbytes for layer in self.layers)

    @property
    def dense_nbytes(self) -> int:
        return sum(layer.dense_nbytes for layer in self.layers)

    @property
    def ratio(self) -> float:
        """Bytes held for every byte of a dense cache; 1.0 for an empty cache."""
        return self.nbytes / self.dense_nbytes if self.dense_nbytes else 1.0

    @property
    def compression(self) -> tuple[float, float] | None:
        """How many times smaller than a dense cache of 16 bits a number: all included, and in codes alone.

        Of the layers with packed rows; None if there are none.
        """
        packed = [layer for layer in self.layers if layer.half_nbytes and layer.code_nbytes]
        if not packed:
            return None
        half = sum(layer.half_nbytes or 0 for layer in packed)
        return half / sum(layer.nbytes for layer in packed), half / sum(layer.code_nbytes or 0 for layer in packed)

    def to_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "seen_tokens": self.seen_tokens,
            "nbytes": self.nbytes,
            "kv_nbytes": self.kv_nbytes,
            "dense_nbytes": self.dense_nbytes,
            "ratio": self.ratio,
            "compression": self.compression,
            "selected": None if self.selected is None else [positions.tolist() for positions in self.selected],
            "filter_layer": self.filter_layer,
            "kernels": self.kernels,
            "attention": self.attention,
            "notes": list(self.notes),
            "layers": [
                {
                    "layer": layer.index,
                    "kind": layer.kind,
                    "rows": layer.rows,
                    "nbytes": layer.nbytes,
                    "kv_nbytes": layer.kv_nbytes,
                    "dense_nbytes": layer.dense_nbytes,
                    "ratio": layer.ratio,
                }
                for layer in self.layers
            ],
        }

    def __rich__(self) -> Table:
        table = Table(
            title=f"{self.policy}\n"
            f"{human_bytes(self.nbytes)} of {human_bytes(self.dense_nbytes)} dense ({self.ratio:.1%})" + self._packed(),
            caption=f"{self.seen_tokens:,} tokens seen; total = keys, values, positions, policy columns, spare slots"
            + f"\nattention over prompts: {self.attention}"
            + ("" if self.kernels is None else f"; kernels: {self.kernels}")
            + self._chosen()
            + "".join(f"\n{note}" for note in self.notes),
            title_justify="left",
            caption_justify="left",
        )
        for heading in ("layer", "kind", "rows/head", "keys+values", "total", "dense", "ratio"):
            table.add_column(heading, justify="left" if heading == "kind" else "right")
        for layer in self.layers:
            table.add_row(
                str(layer.index),
                layer.kind,
                "" if layer.rows is None else f"{layer.rows:,}",
                human_bytes(layer.kv_nbytes),
                human_bytes(layer.nbytes),
                human_bytes(layer.dense_nbytes),
                f"{layer.ratio:.1%}" if layer.dense_nbytes else "",
            )
        return table

    def _packed(self) -> str:
        if self.compression is None:
            return ""
        included, alone = self.compression
        return f"\n{included:.2f}x smaller than 16 bits a number, everything included ({alone:.2f}x in codes alone)"

    def _chosen(self) -> str:
        if self.selected is None:
            return ""
        counts = ", ".join(f"{len(positions):,}" for positions in self.selected)
        return f"\nthe model ran on {counts} prompt tokens, chosen by layer {self.filter_layer}"

    def __str__(self) -> str:
        console = Console(width=110, file=io.StringIO())
        console.print(self)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def kept_share(self, bins: int = 512, sequence: int = 0) -> Tensor:
        """Share of KV heads that keep the tokens of each stretch of positions, `[pruned layers, bins]` float32."""
        pruned = [layer.positions for layer in self.layers if layer.positions is not None]
        bins = max(1, min(bins, self.seen_tokens))
        share = torch.zeros(len(pruned), bins)
        width = torch.zeros(bins).index_add_(
            0, torch.arange(self.seen_tokens) * bins // max(self.seen_tokens, 1), torch.ones(self.seen_tokens)
        )
        for row, positions in enumerate(pruned):
            kept = positions[sequence]
            where = kept[kept >= 0].cpu() * bins // max(self.seen_tokens, 1)
            share[row].index_add_(0, where, torch.ones(len(where)))
            share[row] /= width * kept.shape[0]
        return share

    def plot(self, path: str | Path, sequence: int = 0) -> Path:
        """Draw which positions each layer kept, as a picture file; returns its path."""
        from matplotlib.figure import Figure

        share = self.kept_share(sequence=sequence)
        figure = Figure(figsize=(10, 1.6 + 0.3 * len(share)), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(
            share.numpy(), aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1,
            extent=(0, max(self.seen_tokens, 1), max(len(share), 1) - 0.5, -0.5),
        )  # fmt: skip
        pruned = [layer.index for layer in self.layers if layer.positions is not None]
        step = max(1, len(pruned) // 16)
        axes.set_yticks(range(0, len(pruned), step), [str(index) for index in pruned[::step]])
        axes.set(xlabel="position of the token", ylabel="layer", title=f"tokens kept by {self.policy}")
        figure.colorbar(image, ax=axes, label="share of KV heads")
        path = Path(path)
        try:
            figure.savefig(path, dpi=120)
        except (OSError, ValueError) as error:  # ValueError: a suffix that stands for no format
            raise CacheError(f"no picture can be written to {path}: {error}.") from error
        return path


def human_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"; at most three digits before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
