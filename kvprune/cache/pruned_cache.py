"""`PrunedCache`: the object that takes the place of `DynamicCache` in `generate()`."""

from __future__ import annotations

import copy
import operator
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NoReturn, Protocol, SupportsIndex

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from kvprune.attention.backends import choose
from kvprune.attention.mass import Scoring
from kvprune.cache import stock
from kvprune.cache.layer import PrunedLayer
from kvprune.cache.models import (
    check_supported,
    head_dim,
    heads_of,
    kv_heads,
    layer_config,
    switch_attention,
    text_config,
)
from kvprune.cache.modes import cast, no_autocast, untrainable, without_gradients
from kvprune.cache.progress import Progress, watch
from kvprune.cache.registration import NO_MASK, PREFIX, CacheLength, PendingKeys, PendingMask
from kvprune.cache.report import CacheReport, LayerReport, kind_of
from kvprune.cache.rotary import rotations
from kvprune.cache.selection import FilteredStep, Selection
from kvprune.cache.unread import Unread
from kvprune.errors import CacheError, KVPruneError, PolicyError, UnsupportedModelError
from kvprune.kernels import check_name
from kvprune.policy.base import Policy
from kvprune.policy.registry import parse
from kvprune.table.rows import owned


class Files(Protocol):
    """What writes caches to files and reads them."""

    def save(self, cache: PrunedCache, model: Any, path: str | os.PathLike[str], *, trust_model: bool) -> None: ...

    def load(
        self, kind: type[PrunedCache], path: str | os.PathLike[str], model: Any, policy: Policy | None, **settings: Any
    ) -> PrunedCache: ...


class PrunedCache(Cache):
    """A KV cache whose policy decides, at every prefill and decode step, which tokens stay.

        cache = PrunedCache(model, A2SF(budget=0.25))
        model.generate(**inputs, cache=cache)

    Layers with full attention are pruned; sliding-window, chunked and linear layers of a hybrid model keep the layer
    that transformers gives them.

    Where tensor parallelism splits the heads of a model (`tp_plan="auto"`), every process has a cache of its own, with
    the rows of its own heads: all of them must make theirs with the same policy and see the same tokens, and then keep
    what one process would. What a cache tells, bytes and positions, is of its process; a budget in bytes is of all.

    Args:
        model: a decoder-only transformers model. It is switched to the kvprune attention, which leaves every other
            cache to the attention the model was loaded with.
        policy: a Policy, a chain made with `|`, or a name such as "a2sf".
        device: where the cache lives and is attended to, None for the model's own device(s).
        kernels: what computes on the cache: "torch", "cpu" (compiled loops), "triton", or "auto" for the fastest there
            is.
        attention: what attention over a prompt runs on: "sdpa", "flash" (torch's own kernels), "flash-attn" (the
            package), or "auto" for the fastest that serves the model. All compute the same.

    Raises:
        UnsupportedModelError: encoder-decoder models, and models whose attention cannot be reached or whose cache is
            not made of keys and values per head, or, for a prompt filter, whose decoder takes no position ids. With
            the first tokens, a tensor-parallel plan that splits query heads and KV heads differently.
        CacheError: an attention or a device that cannot be had.
        PolicyError: something that is no policy, a name that is not known, or a layer that this model does not have.
            Kernels that do not run on the cache's device raise it with the first tokens.
    """

    files: ClassVar[Files | None] = None
    """What `save` and `load` use: `kvprune.saving` puts it here, which `from kvprune import PrunedCache` imports."""

    def __init__(
        self,
        model: Any,
        policy: Policy | str,
        *,
        device: torch.device | str | None = None,
        kernels: str = "auto",
        attention: str = "auto",
    ) -> None:
        policy = _policy(policy)
        check_name(kernels)
        check_supported(model)
        layers: list[Any] = DynamicCache(config=model.config).layers
        if not any(isinstance(layer, CacheLayerMixin) for layer in layers):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no attention layers, so there is nothing to prune."
            )
        pruned = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not pruned:
            warnings.warn(
                f"{type(model).__name__} has no layer with full attention, so there is nothing to prune: "
                "this cache behaves like DynamicCache.",
                stacklevel=2,
            )
        configs = [layer_config(text_config(model), index) for index in range(len(layers))]
        widest = max((head_dim(configs[index]) for index in pruned), default=1)
        backend = choose(attention, _device(device) or model.device, model.dtype, widest)
        self._empty = {index: copy.deepcopy(layer) for index, layer in enumerate(layers) if index not in pruned}
        turning = rotations(model, tuple(pruned)) if policy.renumbers and pruned else {}
        for depth, index in enumerate(pruned):
            layers[index] = PrunedLayer(
                policy,
                index,
                device=_device(device),
                kernels=kernels,
                backend=backend,
                rotation=turning.get(index),
                depth=depth,
                pruned_layers=len(pruned),
                stock_tokens=_stock_tokens(layers, configs, configs[index]),
                heads=heads_of(model, index),
            )
        super().__init__(layers=layers)
        self.policy = policy
        self.attention = backend.name
        self.pruned_layers = tuple(pruned)
        self._model_name = type(model).__name__
        self._model = weakref.ref(model)
        self._modules = weakref.WeakSet(model.modules())  # those that may attend to this cache
        self._open: int | None = None  # a layer whose keys came but whose attention has not run
        self._padding: tuple[Tensor, int, Tensor | None] | None = None
        self._stock_states: dict[int, dict[str, Any]] = {}
        decoder = _decoder(model)
        watched = decoder is not None and any(isinstance(each, LinearAttentionCacheLayerMixin) for each in layers)
        last = max(index for index, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin))
        self._progress = Progress(last, watched=watched)
        self.is_hybrid = len(pruned) < len(layers)
        self.prompt_filter: Policy | None = None  # what shortens prompts, and the layer whose attention chooses
        self.filter_layer: int | None = None
        self._filtered: FilteredStep | None = None  # of the forward pass at hand
        self._selection: Selection | None = None  # that holds once the first pruned layer has seen it
        self.replay: Callable[[PrunedCache], None] | None = None  # before a prompt is decided; see passes/replay.py
        self._unread: Unread | None = None  # that holds once the first pruned layer has seen it
        policy.attach(self, model)
        switch_attention(model)
        if watched and decoder is not None:
            watch(decoder)

    # -- one forward pass ------------------------------------------------------------------------------------------

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
        if isinstance(mask, PendingMask):
            mask = mask.padding
        valid = self._valid(mask, query.shape[2], layer)
        first = self._open == self.pruned_layers[0]
        if first:
            self._begin(query.shape[2])
        begins = layer.table is None
        self._open = None
        try:
            output = layer.attend(query, valid, scoring, self._filtered)
        except KVPruneError:
            if first and begins:  # a budget that cannot hold this prompt leaves the cache as it was: empty
                self.reset()
            raise
        self._progress.changing = False
        if first and self._selection is not None:
            layer.selection = self._selection
        if first and self._unread is not None:
            layer.unread = self._unread
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

    def _end_prompt(self) -> None:
        """Decide about a prompt whose policy waits for its end, which is when something is generated, or asked of it.

        Until then more of the prompt may come. One that was interrupted in its layers is left as it is.
        """
        if self._open is None and self._progress.is_complete:
            self._decide_together()

    def note(self, length: int, unread: Unread) -> None:
        """A forward pass of so many columns is about to begin, which no replay has seen."""
        if self._open is None and self._progress.is_complete:
            self._begin(length)
        earlier = self.layers[self.pruned_layers[0]].unread
        self._unread = unread if earlier is None else earlier.followed_by(unread, self.model.get_input_embeddings())

    def _begin(self, length: int) -> None:
        """Before a step of so many columns: what is still to be decided about earlier ones."""
        layer = self.layers[self.pruned_layers[0]]
        if layer.undecided is not None:
            for index in self.pruned_layers:
                self.layers[index].accept()
        if layer.waiting and not layer.takes_prompt(length, self._filtered):
            self._decide_together()

    @without_gradients
    def _decide_together(self) -> None:
        layers = [self.layers[index] for index in self.pruned_layers]
        if self.replay is not None and layers and layers[0].waiting:
            self.replay(self)
        while layers and all(layer.waiting for layer in layers):
            plans = [layer.waiting[0] for layer in layers]
            decisions = plans[0].policy.decide_together([plan.table for plan in plans], [plan.step for plan in plans])
            for layer, decision in zip(layers, decisions, strict=True):
                layer.decide_waiting(decision)

    def expect(self, filtered: FilteredStep | None, selection: Selection | None) -> None:
        """What a prompt filter left of the forward pass that comes now, and the selection that holds after it."""
        self._filtered, self._selection = filtered, selection

    def _forget_step(self) -> None:
        """Let go of what was of one forward pass alone, such as the tensors that sliding windows held before it."""
        self._padding, self._stock_states, self._unread = None, {}, None
        self.expect(None, None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length: tokens seen, padding included, whatever a prompt filter kept from the layers."""
        layers = enumerate(self.layers)
        first = next((index for index, layer in layers if isinstance(layer, CacheLayerMixin)), 0)
        asked = self.layers[max(layer_idx, first)] if layer_idx < len(self.layers) else None
        return super().get_seq_length(layer_idx) + (0 if isinstance(asked, PrunedLayer) else self._skipped)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where a layer's queries begin in the mask of that layer: in columns that it has seen."""
        steady = getattr(self.layers[layer_idx], "steady", None)
        return super().get_seq_length(layer_idx) if steady is None else steady.seen  # generate() asks at every step

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of a layer's mask; the length of a pruned layer says that it is of this cache."""
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        if isinstance(length, CacheLength) and length is not NO_MASK and not torch.compiler.is_dynamo_compiling():
            length.cache = self
        return length, offset

    @property
    def _skipped(self) -> int:
        """Columns that a prompt filter has kept from the layers."""
        selection = self.layers[self.pruned_layers[0]].selection if self.prompt_filter else None
        return selection.skipped if selection else 0

    def _valid(self, mask: Tensor | None, length: int, layer: PrunedLayer) -> Tensor | None:
        """Which of the new tokens are real, bool `[B, length]`; None if all are. Worked out once per forward pass."""
        if mask is None:
            return None
        if mask.ndim != 2:
            raise self.misused(
                f"its attention was given a mask of the shape {tuple(mask.shape)}, which the model, or who called it, "
                "made. A pruned cache can only attend causally, with a padding mask [batch, tokens]: give it that, or "
                "use DynamicCache here"
            )
        if mask.shape[1] < length:
            raise self.misused(
                f"the attention mask has the shape {tuple(mask.shape)}; a pruned cache takes a padding mask "
                f"[batch, tokens] that covers the {length} new tokens"
            )
        if length == 1 and (layer.is_compileable or (layer.tokens and min(layer.tokens) > 0 and not self._filtered)):
            return None  # a generated token is never padding, and looking would make the host wait for the device
        if self._padding is not None and self._padding[0] is mask and self._padding[1] == layer.seen:
            return self._padding[2]
        new = mask[:, mask.shape[1] - length :].bool()
        valid = None if bool(new.all()) else new
        self._padding = mask, layer.seen, valid
        return valid

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

    # -- what it holds ---------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The model it was made for; None if that is gone."""
        return self._model()

    @property
    def is_initialized(self) -> bool:
        """Whether the cache has seen tokens."""
        return bool(self.seen_tokens)

    @property
    def seen_tokens(self) -> int:
        """Logical length: tokens the cache has seen, kept or not, padding included."""
        return self.get_seq_length()

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that this process holds now: keys, values, positions, scores, spare slots.

        Those of the storages behind them, as they were allocated.
        """
        self._end_prompt()
        return sum(layer.nbytes if isinstance(layer, PrunedLayer) else stock.nbytes(layer) for layer in self.layers)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the keys and values that a DynamicCache would hold for the same tokens, in this process.

        Those of the tensors alone: transformers keeps the keys of a sliding window as a view of the whole prompt.
        """
        return sum(
            layer.seen * layer.table.kv_token_bytes
            if isinstance(layer, PrunedLayer) and layer.table is not None
            else stock.dense_nbytes(layer)
            for layer in self.layers
        )

    def kept_positions(self, layer: int) -> Tensor:
        """Positions of the tokens that a layer keeps, LongTensor `[B, Hkv, rows]`, ascending; Hkv of this process.

        Positions count the tokens of each sequence from 0, padding left out. Where a sequence keeps fewer rows than
        another, the row begins with -1. Raises CacheError for a layer that is not pruned.
        """
        self._end_prompt()
        return self._pruned(layer).kept_positions()

    @property
    def selected_positions(self) -> list[Tensor] | None:
        """For each sequence, the positions that a prompt filter chose, LongTensor `[k]`; None if nothing was filtered.

        Positions count the tokens of each sequence from 0, padding left out; those of all filtered prompts, ascending.
        """
        selection = self.layers[self.pruned_layers[0]].selection if self.prompt_filter else None
        return None if selection is None else [torch.tensor(each, dtype=torch.int64) for each in selection.positions]

    def _pruned(self, layer: int) -> PrunedLayer:
        if layer not in self.pruned_layers:
            raise CacheError(
                f"layer {layer} is not pruned (its attention is not full, or there is no such layer); "
                f"the pruned layers are {list(self.pruned_layers)}."
            )
        return self.layers[layer]

    def report(self) -> CacheReport:
        """Measured bytes and kept tokens, layer by layer. `str()` of it is a table, `.plot("kept.png")` a picture."""
        self._end_prompt()
        layers, pruned = [], kind_of(self.policy)
        for index, layer in enumerate(self.layers):
            if isinstance(layer, PrunedLayer) and layer.table is not None:
                table, dense = layer.table, layer.seen * layer.table.kv_token_bytes
                code_nbytes, half_nbytes = None, None
                if table.packed:
                    code_nbytes, half_nbytes = table.code_nbytes, dense * 2 // table.keys.itemsize
                layers.append(
                    LayerReport(
                        index, pruned, layer.nbytes, table.kv_nbytes, dense, self.kept_positions(index),
                        code_nbytes, half_nbytes,
                    )
                )  # fmt: skip
            else:
                held, dense = stock.nbytes(layer), stock.dense_nbytes(layer)
                kind = pruned if isinstance(layer, PrunedLayer) else type(layer).__name__
                layers.append(LayerReport(index, kind, held, held, dense, None))
        tables = (self.layers[index].table for index in self.pruned_layers)
        kernels = ", ".join(sorted({table.kernels.name for table in tables if table is not None})) or None
        return CacheReport(
            str(self.policy), self.seen_tokens, tuple(layers), self.selected_positions, self.filter_layer, kernels,
            self.attention, tuple(self._notes()),
        )  # fmt: skip

    def _notes(self) -> Iterator[str]:
        for index in self.pruned_layers[:1]:
            for policy in self.policy.parts():
                note = policy.note(self.layers[index].prompt_tokens)
                if note is not None:
                    yield f"{type(policy).__name__}: {note}"

    def __repr__(self) -> str:
        held = f"nbytes={self.nbytes:,} of {self.dense_nbytes:,}"
        return f"PrunedCache({self.policy}, seen_tokens={self.seen_tokens}, {held})"

    # -- the rest of the Cache contract ----------------------------------------------------------------------------

    @without_gradients
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, e.g. `crop(-3)`; while the past is recorded, `crop(0)` ends a step.

        Raises CacheError, before anything has changed, where rows were evicted since.
        """
        self._check_closed()
        self._check_complete()
        self._end_prompt()
        try:
            tokens_to_remove = operator.index(tokens_to_remove)  # transformers 5.17 counts in tensors
        except TypeError as error:
            raise CacheError(
                f"crop takes an int, such as -3 for the newest 3 tokens, not {tokens_to_remove!r}."
            ) from error
        for layer in self.layers:
            if isinstance(layer, PrunedLayer):
                layer.check_crop(tokens_to_remove)
            elif stock.has_lost_what_it_needs(layer, -tokens_to_remove):
                raise CacheError(
                    "cannot crop: a sliding-window layer has dropped tokens that would be needed again. Call "
                    "activate_past_recording() before steps that you may want to take back, or keep a fork()."
                )
        super().crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """From now on nothing is evicted in a step before `crop` has said how many of its tokens were accepted."""
        self._end_prompt()
        super().activate_past_recording()

    def reset(self) -> None:
        """Empty the cache, whatever has happened to it; it may then be used with another batch size."""
        self._open = None
        self._forget_step()
        self._progress.forget()
        for index, layer in enumerate(self.layers):
            if isinstance(layer, PrunedLayer):
                layer.reset()
            else:  # transformers' reset leaves states of a batch of their size, and the recording of the past (5.23)
                self.layers[index] = copy.deepcopy(self._empty[index])

    @without_gradients
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these sequences, LongTensor `[B]`, in this order: what beam search does after every step."""
        self._end_prompt()
        super().reorder_cache(beam_idx)

    @without_gradients
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let every sequence stand so many times, side by side. Raises CacheError for less than once."""
        if not isinstance(repeats, SupportsIndex) or operator.index(repeats) < 1:
            raise CacheError(f"batch_repeat_interleave takes an int of at least 1, not {repeats!r}.")
        batch = self._batch_size
        if batch is not None:
            self._end_prompt()
            super().reorder_cache(torch.arange(batch).repeat_interleave(operator.index(repeats)))

    @without_gradients
    def batch_select_indices(self, indices: Tensor | Sequence[int] | Sequence[bool]) -> None:
        """Keep these sequences, in this order: a tensor or sequence of ints `[n]`, negative ones counted from the end,
        or of bools `[B]`. An empty cache takes anything, as DynamicCache does.

        Raises CacheError, before anything has changed, for what names no sequences of this batch.
        """
        batch = self._batch_size
        if batch is not None:
            rows = _sequences(indices, batch)
            self._end_prompt()
            super().reorder_cache(rows)  # layers of every kind take such indices as those of beams

    @property
    def _batch_size(self) -> int | None:
        """How many sequences it holds; None if it is empty."""
        sizes = (
            layer.batch_size if isinstance(layer, PrunedLayer) else stock.batch_size(layer) for layer in self.layers
        )
        return next((size for size in sizes if size is not None), None)

    @without_gradients
    def fork(self) -> PrunedCache:
        """An independent copy: compress a document once, ask many questions. Raises CacheError in a forward pass."""
        self._check_closed()
        self._check_complete()
        self._end_prompt()
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._progress = copy.copy(self._progress)
        other.layers = [
            layer.fork() if isinstance(layer, PrunedLayer) else stock.copied(layer) for layer in self.layers
        ]
        other._forget_step()
        return other

    def __copy__(self) -> PrunedCache:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedCache:
        return self.fork()  # which does not copy the model along

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise CacheError(
            "a PrunedCache is not pickled: save(path) writes it, and PrunedCache.load(path, model) reads it."
        )

    # -- saved and loaded ------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, trust_model: bool = False) -> None:
        """Write the whole cache to a file, for `load` to go on with exactly where this one stands.

        One safetensors file: rows, codes, scores, counts, the policy, and a fingerprint of the model, with checksums of
        all of it. It is written beside the path and then takes its place, so that a file which was there stays whole
        until the new one is. On the way, a copy of the cache is made in the CPU's memory. Of a model that tensor
        parallelism splits, every process saves its own heads: give each a path of its own, and load them likewise.

        trust_model: save although it cannot be told which weights the model computes with, as of some quantized ones;
        such a file can be loaded with `trust_model=True` alone.

        Raises CacheError in the middle of a forward pass, while a step waits for `crop`, where the file cannot be
        written, where the weights cannot be told, and where layers that are not pruned are of a kind that cannot be
        saved; PolicyError for a policy with settings that cannot be written down.
        """
        if self._open is not None:
            raise CacheError("a forward pass is under way: save the cache before it or after it.")
        self._check_complete()
        self._end_prompt()
        model = self._model()
        if model is None:
            raise CacheError("the model of this cache is gone, and a saved cache says whose it is: save it before.")
        self._files().save(self, model, path, trust_model=trust_model)

    @classmethod
    def _files(cls) -> Files:
        if cls.files is None:
            raise CacheError("caches are saved and loaded by kvprune.saving: write `from kvprune import PrunedCache`.")
        return cls.files

    @classmethod
    @without_gradients
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Any,
        *,
        policy: Policy | str | None = None,
        device: torch.device | str | None = None,
        kernels: str = "auto",
        attention: str = "auto",
        trust_model: bool = False,
    ) -> PrunedCache:
        """The cache that `save` wrote, with the model it was made for, in the same dtype.

        Args:
            path, model: as of `save`, and of the constructor. The model may be on another device than it was.
            policy: needed only where its class is not registered (see `kvprune.policies`), with the settings of then.
            device, kernels, attention: as of the constructor; they are settings of this machine, and are not saved.
            trust_model: take your word that the weights at work, adapters included, are those of then. Its config is
                compared all the same.

        Raises:
            CacheError: a file that is none, is damaged, is of a newer format or of another model; a policy that is not
                known, or not the one that was given. Nothing that is not registered is imported, and nothing unpickled.
            UnsupportedModelError, PolicyError, CacheError: as the constructor.
        """
        check_supported(model)
        settings = {"device": device, "kernels": kernels, "attention": attention}
        given = None if policy is None else _policy(policy)
        return cls._files().load(cls, path, model, given, trust_model=trust_model, **settings)


def _policy(policy: Policy | str) -> Policy:
    if isinstance(policy, str):
        return parse(policy)
    if not isinstance(policy, Policy):
        raise PolicyError(
            f"{policy!r} is not a policy: give a Policy object such as A2SF(0.25), a chain such as "
            'A2SF(0.5) | StreamingLLM(0.25), or a name such as "a2sf".'
        )
    return policy


def _sequences(indices: Any, batch: int) -> Tensor:
    """Numbers of sequences of a batch, LongTensor `[n]`, made of what PyTorch takes as an index."""
    given = indices if isinstance(indices, slice | Tensor) else _as_tensor(indices)
    try:
        rows = torch.arange(batch)[given.to("cpu") if isinstance(given, Tensor) else given]
    except (IndexError, TypeError, ValueError) as error:
        raise CacheError(
            f"batch_select_indices takes numbers of sequences from {-batch} to {batch - 1}, or {batch} bools, and was "
            f"given {indices!r} ({error})."
        ) from None
    if rows.ndim != 1 or not len(rows):
        raise CacheError(f"batch_select_indices takes a list of sequences, at least one, not {indices!r}.")
    return rows


def _as_tensor(indices: Any) -> Tensor:
    try:
        return torch.as_tensor([*indices])
    except (TypeError, ValueError, RuntimeError) as error:
        raise CacheError(
            f"batch_select_indices takes a tensor, list or tuple of sequences, not {indices!r} ({error})."
        ) from None


def _decoder(model: Any) -> torch.nn.Module | None:
    """What layers are called by, if the model says it."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if isinstance(decoder, torch.nn.Module) else None


def _device(device: torch.device | str | None) -> torch.device | None:
    try:
        return None if device is None else torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError) as error:  # torch without CUDA asserts
        raise CacheError(f'{device!r} is not a device here: write one such as "cpu" or "cuda:0" ({error}).') from None


def _stock_tokens(layers: list[Any], configs: list[Any], config: Any) -> int:
    """Tokens that sliding windows hold in all, counted in tokens of a layer of this config: it may have other heads."""
    windows = ((getattr(layer, "sliding_window", 0), own) for layer, own in zip(layers, configs, strict=True))
    numbers = sum(window * kv_heads(own) * head_dim(own) for window, own in windows if window)
    return -(-numbers // (kv_heads(config) * head_dim(config))) if numbers else 0


def _is_static(layer: Any, states: Tensor) -> bool:
    """Whether a step of these new tokens changes no shape in a layer."""
    return isinstance(layer, PrunedLayer) and layer.is_compileable and states.shape[2] == 1
