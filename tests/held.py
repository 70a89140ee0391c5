"""What a cache holds of every token, whatever the slots: that rows only lose bits, and hold what is their token's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from families import VOCAB, PrunedCache
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvprune.table.basis import Basis
from kvprune.table.quantize import BITS
from kvprune.table.rotated_rows import RotatedCodec, RotatedRows
from kvprune.table.token_table import TokenTable

EXACT = 16
MOST_ERROR = {2: 1.6, 3: 1.2, 4: 0.8, 5: 0.6, 6: 0.45, 8: 0.15}
"""By bits: how far a decoded row may be from what it stands for, relative to the longest row that any token has."""


@dataclass
class Held:
    """The rows of a layer, by position `0 .. N - 1`; bits are 0 where there is none.

    bits: of keys, and value_bits: int64 `[B, Hkv, N]`, 16 for a row in full precision. keys: `[B, Hkv, N, D]`. values.
    """

    bits: Tensor
    value_bits: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, table: TokenTable, tokens: int) -> Held:
        positions, packed = table.positions.long(), table.packed_length
        bits = torch.full_like(positions, EXACT)
        bits[:, :, :packed] = table.code_bits()
        value_bits = bits.clone()
        for codec in {tier.codec for tier in table.packed if isinstance(tier.codec, RotatedCodec)}:
            value_bits[bits == codec.bits] = codec.bits_of("value")  # of one policy, which has one for as many bits
        at = torch.where(positions < 0, tokens, positions)

        def by_token(rows: Tensor) -> Tensor:
            made = rows.new_zeros(*rows.shape[:2], tokens + 1, *rows.shape[3:])
            index = at if rows.ndim == 3 else at[..., None].expand_as(rows)
            return made.scatter_(2, index, rows)[:, :, :tokens]

        return cls(*map(by_token, (bits, value_bits, table.all_keys(), table.all_values())))

    def of_sequences(self, rows: list[int]) -> Held:
        return Held(self.bits[rows], self.value_bits[rows], self.keys[rows], self.values[rows])


def held_by(cache: PrunedCache) -> list[Held]:
    """Of every pruned layer; nothing of an empty cache. Ends a prompt."""
    cache.end_prompt()
    layers = [cache.layers[index] for index in cache.pruned_layers]
    return [Held.of(layer.table, max(*layer.tokens, 1)) for layer in layers if layer.table is not None]


def assert_rows_only_lost_bits(before: list[Held], after: list[Held], *, moved: bool = False) -> None:
    """Rows that were there before and are there now are what they were, or have fewer bits, and are nearest to it then.

    moved: whether none may have lost bits either.
    """
    for then, now in zip(before, after, strict=True):
        if then.bits.shape[:2] != now.bits.shape[:2]:  # heads have stopped since, where there was padding alone
            continue
        tokens = min(then.bits.shape[2], now.bits.shape[2])
        had, has = then.bits[:, :, :tokens], now.bits[:, :, :tokens]
        both = (had > 0) & (has > 0)
        assert torch.equal(has[both], had[both]) or not moved
        assert bool((has <= had)[both].all())
        assert_codes_are_of_codes(then, now, both & (has < had) & (had < EXACT))
        for old, new in ((then.keys, now.keys), (then.values, now.values)):
            old, new = old[:, :, :tokens], new[:, :, :tokens]
            exact, packed = both & (has == EXACT), both & (has == had) & (has < EXACT)
            assert torch.equal(old[exact], new[exact]), "an exact row has changed"
            # Bases of other sequences may have come beside, so that a matrix is held that was none.
            torch.testing.assert_close(new[packed], old[packed], atol=1e-4, rtol=1e-4)


def assert_codes_are_of_codes(then: Held, now: Held, lost: Tensor) -> None:
    """Packed rows that lost bits, bool `[B, Hkv, N]`: they decode to the encoding of what they decoded to before.

    Which is to be as near to that as its encoding is: between two levels, either may be taken. One step may have
    decided twice, about tokens that waited and about its own, and then it is the encoding of an encoding.
    """
    every = lost.nonzero(as_tuple=True)
    for had, has in {*zip(then.bits[every].tolist(), now.bits[every].tolist(), strict=True)}:
        these = (then.bits[every] == had) & (now.bits[every] == has)
        at = tuple(index[these] for index in every)
        found, before = ((held.keys[at][None, None], held.values[at][None, None]) for held in (now, then))
        sources = [before, *(encoded(before, between) for between in BITS if has < between < had)]
        near = torch.stack([is_near(found, encoded(source, has), source) for source in sources])
        assert bool(near.any(0).all()), f"rows of {had} bits have {has}, and are not those that they were"


def encoded(rows: tuple[Tensor, Tensor], bits: int) -> tuple[Tensor, Tensor]:
    """What keys and values `[1, 1, R, D]` decode to once they have so many bits, without a basis of their own."""
    keys, values = rows
    basis = Basis.fixed(keys.shape[3], values.shape[3])
    return RotatedRows.encode_in(RotatedCodec(bits), basis, keys, values).decoded()


def is_near(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], source: tuple[Tensor, Tensor]) -> Tensor:
    """Whether keys and values are as near to a source as others are, or rounding alone is between, bool `[1, 1, R]`."""
    off, least, size = (
        torch.stack([(a - b).double().square().sum(-1) for a, b in zip(one, other, strict=True)])
        for one, other in ((found, source), (expected, source), (source, (0.0, 0.0)))
    )
    return (off <= 1.01 * least + 1e-8 * size).all(0)


class FirstLayer:
    """Keys and values of every token in a Llama's or Qwen's first layer, which depend on nothing but the token."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel) -> None:
        layer, self.rotary = model.model.layers[0], model.model.rotary_emb
        states = layer.input_layernorm(model.model.embed_tokens(torch.arange(VOCAB)))
        attention = layer.self_attn
        shape = (VOCAB, -1, attention.head_dim)
        self.values = attention.v_proj(states).view(shape)
        keys = attention.k_proj(states).view(shape)
        self.keys = attention.k_norm(keys) if hasattr(attention, "k_norm") else keys
        self.sizes = {"keys": self.keys.norm(dim=-1).amax(0), "values": self.values.norm(dim=-1).amax(0)}

    @torch.no_grad()
    def of(self, ids: list[int]) -> dict[str, Tensor]:
        """`[Hkv, N, D]` each."""
        keys = self.keys[ids].transpose(0, 1)[None]
        cosines, sines = self.rotary(keys, torch.arange(len(ids))[None])
        turned, _ = apply_rotary_pos_emb(keys, keys, cosines, sines)
        return {"keys": turned[0], "values": self.values[ids].transpose(0, 1)}

    def errors(self, held: Held, row: int, ids: list[int], kinds: tuple[str, ...]) -> Iterator[tuple[int, Tensor]]:
        """Of a sequence's rows, by bits, how far they are from what they stand for, as `MOST_ERROR` is counted."""
        expected = self.of(ids)
        for kind in kinds:
            bits = (held.bits if kind == "keys" else held.value_bits)[row, :, : len(ids)]
            found = getattr(held, kind)[row, :, : len(ids)]
            error = (found - expected[kind]).norm(dim=-1) / self.sizes[kind][:, None]
            for width in bits.unique().tolist():
                if width:
                    yield width, error[bits == width]
