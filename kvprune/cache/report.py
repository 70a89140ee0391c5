"""What a cache holds: measured bytes, kept tokens, and a picture of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvprune.errors import CacheError
from kvprune.policy.base import Policy

_WIDTH = 110
_MOST_LINES = 16  # of the table: more layers that differ share lines


def kind_of(policy: Policy) -> str:
    """What a policy does to a layer: "filtered", "pruned", "packed", several of them, or "full" if it keeps all."""
    does = {"filtered": policy.filters_prompt, "pruned": policy.evicts, "packed": bool(policy.codecs)}
    return ", ".join(name for name, done in does.items() if done) or "full"


@dataclass(frozen=True)
class LayerReport:
    """One layer. Bytes are of tensors that exist; `dense_nbytes` is what a DynamicCache would hold."""

    index: int
    kind: str
    """What the policy does, as `kind_of` says, or the class of transformers' layer ("DynamicSlidingWindowLayer")."""
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

    @property
    def fewest_rows(self) -> int | None:
        """Fewest tokens that a KV head of the layer keeps."""
        return None if self.positions is None else int((self.positions >= 0).sum(-1).min())


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
    key_reads: tuple[int, int] | None = None
    """Bytes of keys' codes that generated tokens have read, and of both halves; None where keys are not in two."""
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
    def kept_tokens(self) -> float | None:
        """Tokens that a KV head keeps, on average over heads, sequences and pruned layers; None if none is pruned."""
        kept = [(layer.positions >= 0).sum(-1).flatten() for layer in self.layers if layer.positions is not None]
        return float(torch.cat(kept).double().mean()) if kept else None

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
            "key_reads": None if self.key_reads is None else list(self.key_reads),
            "notes": list(self.notes),
            "layers": [
                {
                    "layer": layer.index,
                    "kind": layer.kind,
                    "rows": layer.rows,
                    "fewest_rows": layer.fewest_rows,
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
            title=f"{self.policy}\n{self._held()}" + self._packed(),
            caption=f"{self.seen_tokens:,} tokens seen; total = keys, values, positions, policy columns, spare slots"
            + f"\nattention over prompts: {self.attention}"
            + ("" if self.kernels is None else f"; kernels: {self.kernels}")
            + self._chosen()
            + self._read()
            + self._more_than_dense()
            + "".join(f"\n{note}" for note in self.notes),
            title_justify="left",
            caption_justify="left",
        )
        for heading in ("layers", "kind", "rows/head", "keys+values", "total", "dense", "ratio"):
            table.add_column(heading, justify="left" if heading == "kind" else "right")
        for layers in _stretches(self.layers) if self.seen_tokens else ():
            held, dense = sum(layer.nbytes for layer in layers), sum(layer.dense_nbytes for layer in layers)
            table.add_row(
                _span(layers[0].index, layers[-1].index),
                layers[0].kind,
                _row_span(layers),
                human_bytes(sum(layer.kv_nbytes for layer in layers)),
                human_bytes(held),
                human_bytes(dense),
                f"{held / dense:.1%}" if dense else "",
            )
        return table

    def _held(self) -> str:
        if not self.seen_tokens:
            return f"empty: {len(self.layers)} layers, and no tokens yet"
        return f"{human_bytes(self.nbytes)} of {human_bytes(self.dense_nbytes)} dense ({self.ratio:.1%})"

    def _more_than_dense(self) -> str:
        if self.nbytes <= self.dense_nbytes:
            return ""
        beside = human_bytes(self.nbytes - self.kv_nbytes)
        return (
            f"\nmore than a dense cache: so few tokens save less than what comes on top of keys and values ({beside}:"
            "\npositions, scores, remembered queries); it pays from some hundred tokens beyond the budget on"
        )

    def _repr_html_(self) -> str:
        """For notebooks."""
        console = Console(width=_WIDTH, file=io.StringIO(), record=True)
        console.print(self)
        return console.export_html(inline_styles=True, code_format='<pre style="line-height: normal">{code}</pre>')

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

    def _read(self) -> str:
        if self.key_reads is None or not self.key_reads[1]:
            return ""
        read, held = self.key_reads
        told = f"{human_bytes(read)} of {human_bytes(held)} of packed keys ({read / held:.1%})"
        return f"\ngenerated tokens have read {told}"

    def __str__(self) -> str:
        console = Console(width=_WIDTH, file=io.StringIO())
        console.print(self)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def kept_share(self, bins: int = 512, sequence: int = 0) -> Tensor:
        """Share of KV heads that keep the tokens of each stretch of positions, `[pruned layers, bins]` float32."""
        pruned = [layer.positions for layer in self.layers if layer.positions is not None]
        bins = max(1, min(bins, self.seen_tokens))
        share = torch.zeros(len(pruned), bins, dtype=torch.float32)
        places = torch.arange(self.seen_tokens) * bins // max(self.seen_tokens, 1)
        width = share.new_zeros(bins).index_add_(0, places, share.new_ones(len(places)))
        for row, positions in enumerate(pruned):
            kept = positions[sequence]
            where = kept[kept >= 0].cpu() * bins // max(self.seen_tokens, 1)
            share[row].index_add_(0, where, share.new_ones(len(where)))
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


def check_picture(path: Path) -> None:
    """Raise CacheError unless a picture can be written there: before the work that it is to show is done."""
    from matplotlib.figure import Figure

    suffix, formats = path.suffix.removeprefix(".").lower(), Figure().canvas.get_supported_filetypes()
    if suffix and suffix not in formats:
        raise CacheError(f"no picture can be written to {path}: write one of {', '.join(sorted(formats))}.")
    if not path.parent.is_dir():
        raise CacheError(f"no picture can be written to {path}: the folder {path.parent} is not there.")


def _stretches(layers: Sequence[LayerReport]) -> list[list[LayerReport]]:
    """The layers in their order, with neighbours together that are alike; in few stretches, if many differ."""
    alike = [list(each) for _, each in groupby(layers, key=lambda layer: (*_looks(layer), layer.nbytes))]
    if len(alike) <= _MOST_LINES:
        return alike
    size = -(-len(layers) // _MOST_LINES)
    return [list(each) for _, each in groupby(layers, key=lambda layer: (layer.kind, layer.index // size))]


def _looks(layer: LayerReport) -> tuple[Any, ...]:
    return layer.kind, layer.rows, layer.fewest_rows, layer.kv_nbytes


def _span(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,}-{last:,}"


def _row_span(layers: Sequence[LayerReport]) -> str:
    most = [layer.rows for layer in layers if layer.rows is not None]
    fewest = [layer.fewest_rows for layer in layers if layer.fewest_rows is not None]
    return _span(min(fewest), max(most)) if most else ""


def human_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"; at most three digits before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
