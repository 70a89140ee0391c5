"""`PrunedCache`: the object that takes the place of `DynamicCache` in `generate()`."""

from __future__ import annotations

import copy
import os
import warnings
import weakref
from typing import Any, ClassVar, Protocol

import torch
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from kvprune.attention.backends import choose
from kvprune.attention.rotary import NO_ROTARY
from kvprune.cache.contents import Contents
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
from kvprune.cache.modes import without_gradients
from kvprune.cache.progress import Progress, watch
from kvprune.cache.recording import Graphs
from kvprune.cache.rolling_back import RollingBack
from kvprune.cache.rotary import rotations
from kvprune.cache.transcript import Transcript
from kvprune.cache.turning import outputs_of, rotary_of
from kvprune.errors import CacheError, PolicyError, UnsupportedModelError
from kvprune.kernels import check_name
from kvprune.policy.base import Policy
from kvprune.policy.registry import parse


class Files(Protocol):
    """What writes caches to files and reads them."""

    def save(self, cache: PrunedCache, model: Any, path: str | os.PathLike[str], *, trust_model: bool) -> None: ...

    def load(
        self, kind: type[PrunedCache], path: str | os.PathLike[str], model: Any, policy: Policy | None, **settings: Any
    ) -> PrunedCache: ...


class PrunedCache(Contents, RollingBack):
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
        cuda_graphs: whether decode steps that are all alike are recorded on a GPU, and replayed. That takes some
            memory beside the cache's. While several threads attend to caches, nothing new is recorded.

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
        cuda_graphs: bool = True,
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
        graphs = Graphs(cuda_graphs)
        for depth, index in enumerate(pruned):
            layers[index] = PrunedLayer(
                policy,
                index,
                device=_device(device),
                kernels=kernels,
                backend=backend,
                rotation=turning.get(index),
                graphs=graphs,
                depth=depth,
                pruned_layers=len(pruned),
                stock_tokens=_stock_tokens(layers, configs, configs[index]),
                heads=heads_of(model, index),
                rotary=rotary_of(model, index) if any(part.turns_back for part in policy.parts()) else NO_ROTARY,
                outputs=outputs_of(model, index) if any(part.weighs_outputs for part in policy.parts()) else None,
            )
        super().__init__(layers=layers)
        self.policy = policy
        self.cuda_graphs = cuda_graphs
        self.attention = backend.name
        self.pruned_layers = tuple(pruned)
        self._model_name = type(model).__name__
        self._model = weakref.ref(model)
        self._modules = weakref.WeakSet(model.modules())  # those that may attend to this cache
        self._open = None  # a layer whose keys came but whose attention has not run
        self._mask = None  # that the model gave its attention, and no mask function made
        self._read_at = None  # how many columns had been seen when a mask was read that a steady step needs none of
        self._makes_masks = False  # whether the model makes one where it is given none
        self._columns = None  # of a prompt filter's input, after it
        self._stock_states = {}
        decoder = _decoder(model)
        watched = decoder is not None and any(isinstance(each, LinearAttentionCacheLayerMixin) for each in layers)
        last = max(index for index, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin))
        self._progress = Progress(last, watched=watched)
        self.is_hybrid = len(pruned) < len(layers)
        self.prompt_filter = None  # what shortens prompts, and the layer whose attention chooses
        self.filter_layer = None
        self._filtered = None  # of the forward pass at hand
        self._selection = None  # that holds once the first pruned layer has seen it
        self.replay = None  # before a prompt is decided; see passes/replay.py
        self.cascade = None  # what lets tokens stop between layers; see passes/trip.py
        self.trip = None  # of the forward pass at hand, where tokens may stop
        self._unread = None  # that holds once the first pruned layer has seen it
        self._transcript = None
        policy.attach(self, model)
        switch_attention(model)
        if watched and decoder is not None:
            watch(decoder)

    @property
    def transcript(self) -> Transcript | None:
        """The text that the cache has read, if whoever read it said so and nothing has come since; None otherwise."""
        known = self._transcript
        told = known is not None and not self.interrupted and len(known.ids) == self.seen_tokens
        return known if told and self._batch_size in (None, 1) else None

    @transcript.setter
    def transcript(self, transcript: Transcript | None) -> None:
        self._transcript = transcript

    # -- saved and loaded ------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, trust_model: bool = False) -> None:
        """Write the whole cache to a file, for `load` to go on with exactly where this one stands.

        One safetensors file: rows, codes, scores, counts, the policy, and a fingerprint of the model, with checksums of
        all of it; the transcript too, where there is one. It is written beside the path and then takes its place, so
        that a file which was there stays whole until the new one is. On the way, a copy of the cache is made in the
        CPU's memory. Of a model that tensor parallelism splits, every process saves its own heads: give each a path of
        its own, and load them likewise.

        trust_model: save although it cannot be told which weights the model computes with, as of some quantized ones;
        such a file can be loaded with `trust_model=True` alone.

        Raises CacheError in the middle of a forward pass, while a step waits for `crop`, where the file cannot be
        written, where the weights cannot be told, and where layers that are not pruned are of a kind that cannot be
        saved; PolicyError for a policy with settings that cannot be written down.
        """
        if self._open is not None:
            raise CacheError("a forward pass is under way: save the cache before it or after it.")
        self._check_complete()
        self.end_prompt()
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
        cuda_graphs: bool = True,
        trust_model: bool = False,
    ) -> PrunedCache:
        """The cache that `save` wrote, with the model it was made for, in the same dtype.

        Args:
            path, model: as of `save`, and of the constructor. The model may be on another device than it was.
            policy: needed only where its class is not registered (see `kvprune.policies`), with the settings of then.
            device, kernels, attention, cuda_graphs: as of the constructor; they are settings of this machine, and are
                not saved.
            trust_model: take your word that the weights at work, adapters included, are those of then. Its config is
                compared all the same.

        Raises:
            CacheError: a file that is none, is damaged, is of a newer format or of another model; a policy that is not
                known, or not the one that was given. Nothing that is not registered is imported, and nothing unpickled.
            UnsupportedModelError, PolicyError, CacheError: as the constructor.
        """
        check_supported(model)
        settings = {"device": device, "kernels": kernels, "attention": attention, "cuda_graphs": cuda_graphs}
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
