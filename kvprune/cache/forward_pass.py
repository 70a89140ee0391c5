"""`ForwardPass`: one forward pass on a cache, from the keys of its first layer to the attention of its last.

    update     a layer hands over its new keys and values, and gets `PendingKeys` for them
    attend     the kvprune attention comes back with the queries, and the layer makes its step

Around it: what a pass must be to be served, and what is told where it is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from kvprune.attention.mass import Scoring
from kvprune.cache.adapters import check_adapters
from kvprune.cache.columns import Columns, Past
from kvprune.cache.layer import PrunedLayer
from kvprune.cache.masks import Masks
from kvprune.cache.models import CACHE_ARGUMENT, text_config
from kvprune.cache.modes import cast, no_autocast, untrainable, without_gradients
from kvprune.cache.progress import Progress
from kvprune.cache.registration import PREFIX, PendingKeys
from kvprune.cache.selection import FilteredStep, Selection
from kvprune.cache.unread import Unread
from kvprune.errors import CacheError, KVPruneError, UnsupportedModelError
from kvprune.policy.base import Policy
from kvprune.table.rows import owned


class ForwardPass(Masks):
    """The part of a `PrunedCache` that the model talks to. Every method changes what the cache holds, or may."""

    is_hybrid: bool
    filter_layer: int | None
    _model_name: str
    _modules: weakref.WeakSet[torch.nn.Module]
    _progress: Progress
    _columns: Columns | None
    _stock_states: dict[int, dict[str, Any]]
    _filtered: FilteredStep | None
    _selection: Selection | None
    _unread: Unread | None
    replay: Callable[[Any], None] | None
    cascade: Policy | None
    trip: Any
    _model: Callable[[], Any]

    def reset(self) -> None:
        """Empty the cache, whatever has happened to it."""
        raise NotImplementedError  # by the cache, of which this is a part

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys and values. What a pruned layer returns is for the kvprune attention alone."""
        layer = self.layers[layer_idx]
        if torch.compiler.is_dynamo_compiling() and not _is_static(layer, key_states):
            return self._update_uncompiled(key_states, value_states, layer_idx, *args, **kwargs)
        self._check_closed()
        self._come_to(layer_idx, "keys", key_states.shape[0])
        if isinstance(layer, PrunedLayer):
            super().update(cast(key_states), cast(value_states), layer_idx, *args, **kwargs)
            self._open = layer_idx
            self._progress.changing = True
            return PendingKeys(key_states, self), value_states  # type: ignore[return-value]
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(layer, DynamicLayer) and key_states.shape[2] > 1:
            # A sliding window is a view of the whole prompt otherwise (transformers 5.23), which would stay in memory.
            layer.keys, layer.values = owned(layer.keys), owned(layer.values)
        return keys, values

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Of a layer with linear attention; transformers' own."""
        self._come_to(layer_idx, f"conv {state_idx}", conv_states.shape[0])
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    def update_recurrent_state(self, states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Of a layer with linear attention; transformers' own."""
        self._come_to(layer_idx, f"recurrent {state_idx}", states.shape[0])
        return super().update_recurrent_state(states, layer_idx, state_idx, **kwargs)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Of a layer with linear attention, which may update it in place; transformers' own."""
        self._come_to_state()
        return super().get_conv_state(layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Of a layer with linear attention, which may update it in place; transformers' own."""
        self._come_to_state()
        return super().get_recurrent_state(layer_idx, state_idx)

    def begins_pass(self) -> None:
        """A decoder that is watched is called with this cache."""
        if torch.compiler.is_dynamo_compiling():
            self._progress.forget()
            return
        self._check_complete()

    def check_uninterrupted(self) -> None:
        self._check_closed()
        self._check_complete()

    def ends_pass(self) -> None:
        """It has come to its end."""
        self._progress.end()

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        mask: Tensor | None,
        **settings: Any,
    ) -> Tensor:
        """The attention of the layer that was updated last; called by the registered attention function.

        settings: of the module's attention, see `scoring_of`.
        query: `[B, Hq, L, D]`. mask: the two-dimensional padding mask, or None. Returns `[B, L, Hq, Dv]`.
        """
        if self._open is None:
            raise self.misused("its attention runs more than once on the same keys", UnsupportedModelError)
        query = cast(query)
        if torch.is_autocast_enabled(query.device.type):
            with no_autocast(query.device):
                return self.attend(module, query, mask, **settings)
        return untrainable(self._attend(module, query, mask, settings), query)

    @without_gradients
    def _attend(self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, settings: dict[str, Any]) -> Tensor:
        layer = self.layers[self._open]
        if torch.compiler.is_dynamo_compiling() and not _is_static(layer, query):
            return self._attend_uncompiled(module, query, mask, settings)
        scoring = self.scoring_of(module, query, layer, **settings)
        if torch.compiler.is_dynamo_compiling() and mask is not None:  # what is in it decides what to do
            return self._attend_uncompiled(module, query, mask, settings)
        first = self._open == self.pruned_layers[0]
        if first:
            self.check_kept(layer, query.shape[2], **settings)
        looked = self.look(mask, query.shape[2], query.device, query.shape[0])
        valid, past = (None, None) if looked is None else (looked.valid, looked.past)
        if first:
            self.check_goes_on(layer, query.shape[2], looked, **settings)
            self._begin(query.shape[2], past)
        begins = layer.table is None
        self._open = None
        try:
            output = layer.attend(query, valid, scoring, self._filtered, past)
        except KVPruneError:
            if first and begins:  # a budget that cannot hold this prompt leaves the cache as it was: empty
                self.reset()
            raise
        self._progress.changing = False
        if looked is not None or self._columns is not None:
            layer.columns = self._columns or looked.columns  # type: ignore[union-attr]
        if first and self._selection is not None:
            layer.selection = self._selection
        if first and self._unread is not None:
            layer.unread = self._unread if past is None else self._unread.hiding(past.shown, query.shape[2])
        if layer.index == self.pruned_layers[-1]:
            self._forget_step()
        return output

    # Steps that change shapes look at counts, and some at what is in tensors: a compiler could make nothing of them.
    @torch.compiler.disable
    def _update_uncompiled(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # The next run of a CUDA graph overwrites what this one returned, and a first step's keys may stay as they are.
        return self.update(keys.clone(), values.clone(), *args, **kwargs)

    @torch.compiler.disable
    def _attend_uncompiled(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._attend(*args, **kwargs)

    def scoring_of(
        self,
        module: torch.nn.Module,
        query: Tensor,
        layer: PrunedLayer,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        sliding_window: int | None = None,
        position_bias: Tensor | None = None,
        is_causal: bool | None = None,
        **_: Any,
    ) -> Scoring:
        """How a module makes probabilities of logits; raises where this cache cannot do the same."""
        if module not in self._modules:
            raise self.misused("the model that was called is another one")
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            raise self.misused("its attention is not causal, as in an encoder", UnsupportedModelError)
        if position_bias is not None:
            raise self.misused("its attention adds a position bias", UnsupportedModelError)
        if sliding_window is not None and layer.seen + query.shape[2] > sliding_window:
            raise self.misused(
                f"layer {layer.index} attends through a sliding window of {sliding_window} that its config does not "
                "declare as such",
                UnsupportedModelError,
            )
        return Scoring(query.shape[3] ** -0.5 if scaling is None else scaling, softcap, s_aux)

    def end_prompt(self) -> None:
        """Decide now about a prompt whose policy waits for its end, such as `KVzip` or any that shares over layers.

        Otherwise they do so when something is generated, or the cache is looked at or forked: until then more of the
        prompt may come, and is decided about with it. Say it before a question that compression must not know. A
        prompt that was interrupted in its layers is left as it is.
        """
        if self._open is None and self._progress.is_complete:
            self._decide_together()

    def note(self, length: int, unread: Unread) -> None:
        """A forward pass of so many columns is about to begin, which no replay has seen."""
        if self._open is None and self._progress.is_complete:
            self._begin(length)
        earlier = self.layers[self.pruned_layers[0]].unread
        self._unread = unread if earlier is None else earlier.followed_by(unread, self.model.get_input_embeddings())

    def _begin(self, length: int, past: Past | None = None) -> None:
        """Before a step of so many columns: what is still to be decided about earlier ones."""
        layer = self.layers[self.pruned_layers[0]]
        if layer.undecided is not None:
            for index in self.pruned_layers:
                self.layers[index].accept()
        if layer.waiting and (past or not layer.takes_prompt(length, self._filtered)):
            self._decide_together()

    @without_gradients
    def _decide_together(self) -> None:
        layers = [self.layers[index] for index in self.pruned_layers]
        if self.replay is not None and layers and layers[0].waiting:
            for layer in layers:
                layer.settle_mode()  # what is found is written to columns
            self.replay(self)
        while layers and all(layer.waiting for layer in layers):
            plans = [layer.waiting[0] for layer in layers]
            for layer, plan in zip(layers, plans, strict=True):
                layer.settle_mode()  # policies write to columns
                plan.table = layer.table.scoped(plan.scope)
            decisions = plans[0].policy.decide_together([plan.table for plan in plans], [plan.step for plan in plans])
            for layer, decision in zip(layers, decisions, strict=True):
                layer.decide_waiting(decision)

    def expect(
        self, filtered: FilteredStep | None, selection: Selection | None, columns: Columns | None = None
    ) -> None:
        """What a prompt filter left of the forward pass that comes now, and the selection that holds after it.

        columns: those of the cache after it; None if they say nothing new.
        """
        self._filtered, self._selection, self._columns = filtered, selection, columns

    def _forget_step(self) -> None:
        """Let go of what was of one forward pass alone, such as the tensors that sliding windows held before it."""
        self._mask, self._stock_states, self._unread = None, {}, None
        self.expect(None, None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length: tokens seen, padding included, whatever a prompt filter kept from the layers."""
        layers = enumerate(self.layers)
        first = next((index for index, layer in layers if isinstance(layer, CacheLayerMixin)), 0)
        asked = self.layers[max(layer_idx, first)] if layer_idx < len(self.layers) else None
        length = super().get_seq_length(layer_idx) + (0 if isinstance(asked, PrunedLayer) else self._skipped)
        if not torch.compiler.is_dynamo_compiling() and length == 0:  # asked by generate() before it begins
            check_adapters(self._model(), CACHE_ARGUMENT)
        return length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where a layer's queries begin in the mask of that layer: in columns that it has seen."""
        steady = getattr(self.layers[layer_idx], "steady", None)
        return super().get_seq_length(layer_idx) if steady is None else steady.seen  # generate() asks at every step

    @property
    def _skipped(self) -> int:
        """Columns that a prompt filter has kept from the layers."""
        selection = self.layers[self.pruned_layers[0]].selection if self.prompt_filter else None
        return selection.skipped if selection else 0

    def _check_closed(self) -> None:
        if self._open is not None:
            raise self.bypassed()

    def _come_to(self, layer: int, call: str, batch_size: int) -> None:
        if torch.compiler.is_dynamo_compiling():
            self._progress.forget()
            return
        if self._progress.begins(layer, call):
            self._check_whole(batch_size)
        self._progress.note(layer, call)

    def _come_to_state(self) -> None:
        if not torch.compiler.is_dynamo_compiling():
            self._progress.touch()

    def _check_whole(self, batch_size: int) -> None:
        """Before a forward pass: all layers have seen the same, and the batch is the one they hold."""
        if not self._progress.watched:  # else it was seen to when the pass began
            self._check_complete()
        for index in self.pruned_layers[:1]:
            table = self.layers[index].table
            if table is not None and table.batch_size != batch_size:
                self._progress.end()  # before anything has changed
                raise CacheError(
                    f"this cache holds a batch of {table.batch_size}, and the model was called with a batch of "
                    f"{batch_size}. Make a new PrunedCache, or call reset() to start over."
                )
        if self.is_hybrid:
            self._stock_states = {
                index: dict(vars(layer))
                for index, layer in enumerate(self.layers)
                if isinstance(layer, DynamicLayer)  # these replace their tensors and never write into them
            }

    @property
    def lengths(self) -> set[int]:
        """How many tokens the layers have seen: one number, but for a forward pass that is not complete."""
        return {
            layer.get_seq_length() + (0 if isinstance(layer, PrunedLayer) else self._skipped)
            for layer in self.layers
            if isinstance(layer, CacheLayerMixin)
        }

    @property
    def interrupted(self) -> bool:
        """Whether a forward pass has not come to its end: nothing but `reset` helps then."""
        return self._open is not None or not self._progress.is_complete or len(self.lengths) > 1

    def _check_complete(self) -> None:
        if not self._progress.is_complete or len(self.lengths) > 1:
            raise CacheError(
                "a forward pass on this cache was interrupted, and not all of its layers have seen the same tokens: "
                "call reset() and start over, or go on with a fork() made before."
            )

    def bypassed(self, use: str = "") -> KVPruneError:
        """The error to raise where another attention than kvprune's was given a layer's keys. use: it made of them."""
        model = self._model()
        if use and model is not None and (text_config(model)._attn_implementation or "").startswith(PREFIX):
            return self.misused(
                f"the keys of layer {self._open} were changed after they had been cached ({use}), by the model itself "
                "or by another one that was called. kvprune cannot reach what such a model attends to: use "
                "DynamicCache with it",
                UnsupportedModelError,
            )
        return self.misused(
            f"the attention of layer {self._open} did not go through kvprune. Either another model was called, or "
            "set_attn_implementation() was called since, or the model changes its keys after caching them, or a "
            "forward pass was interrupted"
        )

    def misused(self, reason: str, error: type[KVPruneError] = CacheError) -> KVPruneError:
        """The error to raise for a forward pass that this cache cannot serve; the keys it brought are dropped."""
        if self._open is not None:
            self.layers[self._open].incoming = None
            if self._open == self.pruned_layers[0]:  # nothing but stock layers has changed yet
                for index, state in self._stock_states.items():
                    vars(self.layers[index]).update(state)
                self._stock_states = {}
                if all(isinstance(layer, CacheLayerMixin) for layer in self.layers[: self._open]):
                    self._progress.forget()
        self._open = None
        return error(
            f"this PrunedCache was made for {self._model_name}, but {reason}. "
            "Make a new PrunedCache(model, policy) for each model and conversation."
        )

    @property
    def model(self) -> Any:
        """The model it was made for; None if that is gone."""
        return self._model()


def _is_static(layer: Any, states: Tensor) -> bool:
    """Whether a step of these new tokens changes no shape in a layer."""
    return isinstance(layer, PrunedLayer) and layer.is_compileable and states.shape[2] == 1
