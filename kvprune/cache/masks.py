"""`Masks`: what a padding mask, and other arguments of a forward pass, say of it before a layer of it changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvprune.cache.columns import Looked, Reading
from kvprune.cache.layer import PrunedLayer
from kvprune.cache.registration import NO_MASK, CacheLength, PendingMask
from kvprune.errors import CacheError, KVPruneError
from kvprune.policy.base import Policy


class Masks(Cache):
    """The part of a `PrunedCache` that reads masks. Nothing here changes what the cache holds."""

    layers: Any
    pruned_layers: tuple[int, ...]
    prompt_filter: Policy | None
    _open: int | None
    _mask: tuple[Tensor, Reading] | None
    _read_at: int | None
    _makes_masks: bool

    def misused(self, reason: str, error: type[KVPruneError] = CacheError) -> KVPruneError:
        """The error to raise for a forward pass that this cache cannot serve."""
        raise NotImplementedError  # by the cache, of which this is a part

    def check_uninterrupted(self) -> None:
        """Raise CacheError where an earlier forward pass did not come to its end: no mask would fit its lengths."""
        raise NotImplementedError  # by the cache, of which this is a part

    @property
    def is_compileable(self) -> bool:
        """Whether a decode step changes no shape and never waits for the device: one graph serves all steps.

        Where it is, generate() gives a model no mask. One that makes a mask of ones then (BioGPT, and OPT of
        transformers 5.17), showing what is hidden, is to be given masks from then on.
        """
        return not self._makes_masks and all(layer.is_compileable for layer in self.layers)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of a layer's mask; the length of a pruned layer says that it is of this cache."""
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        if isinstance(length, CacheLength) and length is not NO_MASK and not torch.compiler.is_dynamo_compiling():
            length.cache = self
        return length, offset

    def read(self, mask: PendingMask, length: int | None, batch: int | None = None) -> PendingMask | None:
        """Begin to read a padding mask, before a forward pass of `batch` sequences of `length` columns comes to layers.

        None if there is nothing to read, and a compiled step is not to be given anything.
        """
        layer = self.layers[self.pruned_layers[0]]
        steady = layer.steady if length == 1 else None
        if mask.padding is None:
            return mask if steady is None else None
        mask.reading = Reading(mask.padding)
        if steady is not None:
            covered = steady.ahead or mask.padding.shape[1] > layer.seen
            if covered and mask.reading.is_ordinary(layer.columns, 1):
                self._read_at = None if steady.ahead else layer.seen
                return None
            if self._read_at == layer.seen and bool(mask.padding.all()):
                self._makes_masks = True
                return None
            for index in self.pruned_layers:
                self.layers[index].leave_steady()
        if self.pruned_layers[0] and length is not None:  # layers come first that a refusal could not undo
            self.check_uninterrupted()
            self.look(mask, length, mask.padding.device, batch)
        return mask

    def look(self, mask: Any, length: int, device: torch.device, batch: int | None) -> Looked | None:
        """What a mask says of this forward pass, found out once for all layers; None if nothing of note."""
        if isinstance(mask, PendingMask):
            reading = mask.reading
            if reading is None and mask.padding is not None:  # made where steps are compiled
                reading = mask.reading = Reading(mask.padding)
        elif mask is not None and mask.ndim != 2:
            raise self.misused(
                f"its attention was given a mask of the shape {tuple(mask.shape)}, which the model, or who called it, "
                "made. A pruned cache can only attend causally, with a padding mask [batch, tokens]: give it that, or "
                "use DynamicCache here"
            )
        elif mask is not None and (self._mask is None or self._mask[0] is not mask):
            reading = Reading(mask)
            self._mask = mask, reading
        else:
            reading = self._mask and self._mask[1] if mask is not None else None
        if reading is None:
            return None
        if not reading.is_looked_at:
            layer = self.layers[self.pruned_layers[0] if self._open is None else self._open]
            try:
                if self.prompt_filter is None:
                    reading.look(layer.columns, layer.seen, length, device, batch)
                else:  # what came before is seen to where the prompt is filtered
                    reading.look_at_newest(layer.columns, length, device, batch)
            except CacheError as error:
                raise self.misused(str(error)) from None
            if reading.looked is not None and reading.looked.past is not None and layer.rotation is not None:
                raise self.misused(
                    'its attention mask hides tokens that were visible before, and with positions="cache" keys are '
                    "turned by the positions they came with: leave that out where something is hidden later"
                )
        return reading.looked

    def check_kept(
        self,
        layer: PrunedLayer,
        length: int,
        *,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> None:
        """Raise CacheError where generate() brings all tokens again, which it does if it is told to use no cache."""
        if use_cache is not False or length == 1 or not layer.tokens:
            return
        # Some models never hand use_cache on to their layers, which then have it False (Qwen3-VL, transformers 5.24).
        last = None if self.prompt_filter is not None else _last(position_ids, length)
        if last is None:
            again = length > max(layer.tokens)
        else:
            again = all(at <= count for at, count in zip(last, layer.tokens, strict=True))
        if again:
            raise self.misused(
                "it was called with use_cache=False, under which generate() brings all tokens again at every step: "
                "leave that out, or give no cache"
            )

    def check_goes_on(
        self,
        layer: PrunedLayer,
        length: int,
        looked: Looked | None,
        *,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> None:
        """Raise CacheError for new tokens that do not come behind what the cache has seen, as far as one can tell."""
        if length == 1 or not layer.tokens or self.prompt_filter is not None:
            return
        past = None if looked is None else looked.past
        last, before = _last(position_ids, length), past.left(layer.tokens) if past else layer.tokens
        if last is None or any(at > count for at, count in zip(last, before, strict=True)):
            return
        # Several tokens reach no further than one would: they begin anew, and not all go on behind padding.
        new = [length] * len(last) if looked is None or looked.valid is None else looked.valid.sum(1).tolist()
        if max(last) < min(before) or all(count > seen for count, seen in zip(new, before, strict=True)):
            raise self.misused(
                f"the new tokens have positions up to {max(last)}, and the cache has seen {min(before)} tokens: "
                "they are of a prompt that does not begin with what the cache has seen, and goes on from there (as "
                "where a chat template leaves out earlier thinking, or use_cache=False brings all tokens again). Give "
                "generate() the whole conversation, or take a fork() from before"
            )


def _last(position_ids: Tensor | None, length: int) -> list[int] | None:
    """The position of each sequence's last new token; None if positions of another shape, or none, were given."""
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or position_ids.shape[1] != length:
        return None
    last: list[int] = position_ids[:, -1].tolist()
    return last
