"""The stock model, seeing just what it is told to: its logits and its attention, for any history of evictions."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from families import PAD, build
from torch import Tensor


class Masked:
    """A stock model whose full-attention layers see what they are told to, and whose attention can be looked at."""

    def __init__(self, family: str, **shape: Any) -> None:
        """shape: what the config of the family has otherwise."""
        self.model = build(family, dtype=torch.float64, **shape)
        self.model.set_attn_implementation("eager")
        config = self.model.config
        self.kv_heads, self.group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        self.layers = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
        self.window = None if len(self.layers) == len(kinds) else config.sliding_window
        self._visible: dict[int, Tensor] = {}
        self._attention: dict[int, Tensor] = {}
        for index in self.layers:
            attention = self.model.model.layers[index].self_attn
            attention.register_forward_pre_hook(partial(self._hide, index), with_kwargs=True)
            attention.register_forward_hook(partial(self._note, index))

    def _hide(self, index: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = torch.zeros(self._visible[index].shape, dtype=torch.float64)
        return args, {**kwargs, "attention_mask": hidden.masked_fill(~self._visible[index], -math.inf)}

    def _note(self, index: int, module: Any, args: Any, output: Any) -> None:
        self._attention[index] = output[1]

    @torch.no_grad()
    def run(self, ids: list[list[int]], left: list[list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        """Logits `[B, T, vocab]`, and of every full-attention layer the probabilities `[B, Hkv, G, T, T]`.

        ids: of each sequence. left: of each such layer and sequence, how many tokens there were when a row left,
        `[Hkv, tokens]`.
        """
        longest = max(map(len, ids))
        tokens = torch.arange(longest)
        padded = torch.tensor([[*each, *[PAD] * (longest - len(each))] for each in ids])
        for index, rows in zip(self.layers, left, strict=True):
            gone = torch.stack([F.pad(each, (0, longest - each.shape[1]), value=math.inf) for each in rows])
            visible = (tokens <= tokens[:, None]) & (tokens[:, None] < gone[:, :, None])
            self._visible[index] = visible.repeat_interleave(self.group, dim=1)
        logits = self.model(padded, position_ids=tokens.expand_as(padded), use_cache=False).logits
        return logits, [self._attention[index].unflatten(1, (self.kv_heads, self.group)) for index in self.layers]


masked = cache(Masked)
