"""`Router`: the gates of all layers of a model, fitted to a text once, and kept in a file."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvprune.cache.pruned_cache import PrunedCache
from kvprune.errors import CacheError, PolicyError
from kvprune.routing.gates import FEATURES, Gate
from kvprune.routing.training import loss_of, train
from kvprune.saving.fingerprint import differences, fingerprint

FORMAT = "kvprune.router"


class Router(tuple[tuple[float, ...], ...]):
    """Of every layer the numbers of its gate; none of a layer that all tokens compute. It is a value, and a setting.

        router = Router.fit(model, tokenizer(text, return_tensors="pt").input_ids, FTP("0.3:0.3"))
        router.save("router.safetensors")
        PrunedCache(model, FTP("0.3:0.3", router=Router.load("router.safetensors", model)))

    model: what tells whose it is, see `save`; None where nobody has said. losses: of the steps of its training.
    """

    model: dict[str, Any] | None
    losses: tuple[float, ...]
    trusted = False  # whether somebody has said that the weights are those of then

    def __new__(cls, layers: Any = (), model: dict[str, Any] | None = None, losses: tuple[float, ...] = ()) -> Self:
        """Raises PolicyError for numbers that are no gates."""
        try:
            gates = tuple(tuple(float(number) for number in layer) for layer in layers)
        except (TypeError, ValueError):
            gates = ((math.nan,),)
        shape = FEATURES + 2
        if not all(len(gate) % shape == 0 and all(map(math.isfinite, gate)) for gate in gates):
            raise PolicyError(
                "a router is what Router.fit or Router.load returns, the path of its file, or its numbers: of every "
                f"layer {shape} for each hidden unit, all finite."
            )
        router = super().__new__(cls, gates)
        router.model, router.losses = model, losses
        return router

    def __repr__(self) -> str:
        return f"Router({len(self)} layers)"

    def gate(self, layer: int, device: torch.device) -> Gate:
        """That of a layer which has one."""
        return Gate.of(self[layer], device)

    @classmethod
    def fit(
        cls,
        model: Any,
        ids: Tensor,
        policy: Any,
        *,
        steps: int = 100,
        length: int = 256,
        units: int = 8,
        rate: float = 0.01,
        guide: float = 0.01,
        seed: int = 0,
    ) -> Self:
        """Train the gates of the layers that a policy lets tokens go past, on one text; the model stays as it is.

        Every step takes a piece of the text at random and runs the model twice over it, once as it is and once routed,
        with gradients to the gates alone.

        Args:
            ids: of the text, LongTensor `[1, n]`. policy: an `FTP`, for its schedule and window.
            steps, length: pieces, and their tokens. units: hidden ones of a gate. rate: of Adam.
            guide: weight of what the loss has beside the divergence from the model, see `routing.training`.

        Raises PolicyError for a policy that does not route, settings without meaning and a text shorter than a piece;
        UnsupportedModelError for models that FTP cannot serve.
        """
        policy = _unrouted(policy)
        if ids.ndim != 2 or len(ids) != 1 or ids.shape[1] < length:
            raise PolicyError(f"give the ids of one text of at least {length} tokens, [1, n], not {list(ids.shape)}.")
        if min(steps, units) < 1 or length < 2:
            raise PolicyError(f"steps and units are at least 1, length 2, not {steps}, {units} and {length}.")
        layers = len(PrunedCache(model, policy).layers)  # which also puts hooks on its layers
        if not any(policy.sparsity(layer, layers) for layer in range(layers)):
            raise PolicyError(f"{policy} lets no token go past any of {layers} layers, so there is nothing to fit.")
        gates, losses = train(
            model, ids.to(model.device), policy, layers, steps=steps, length=length, units=units, rate=rate,
            guide=guide, seed=seed,
        )  # fmt: skip
        numbers = [gates[layer].numbers() if layer in gates else () for layer in range(layers)]
        return cls(numbers, fingerprint(model), tuple(losses))

    @classmethod
    @torch.no_grad()
    def divergence(cls, model: Any, ids: Tensor, policy: Any) -> float:
        """KL divergence of a routed model from the model itself on one text, ids `[1, n]`, in nats a token.

        policy: an `FTP`; without a router, it is the static one that is measured.
        """
        router: Router | None = policy.router
        layers = len(PrunedCache(model, policy).layers)
        gates = None if router is None else {
            layer: router.gate(layer, model.device) for layer in range(layers) if policy.sparsity(layer, layers)
        }  # fmt: skip
        return float(loss_of(model, ids.to(model.device), policy, gates, layers).distillation)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, safetensors. Raises CacheError where that cannot be, or nobody knows of which model."""
        if self.model is None:
            raise CacheError("of which model this router is has not been said: save what Router.fit returns.")
        tensors = {f"layers.{layer}": torch.tensor(gate) for layer, gate in enumerate(self) if gate}
        metadata = {"format": FORMAT, "version": "1", "layers": str(len(self)), "model": json.dumps(self.model)}
        try:
            save_file(tensors, path, metadata)
        except (OSError, SafetensorError) as error:
            raise CacheError(f"the router cannot be saved to {path}: {error}.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any = None, *, trust_model: bool = False) -> Self:
        """Read what `save` wrote. model: that it is for; without one, only its form is looked at.

        Raises CacheError for a file that is none or of another model. trust_model: as of `PrunedCache.load`.
        """
        try:
            with safe_open(path, "pt") as opened:
                metadata = opened.metadata() or {}
                found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
        except (OSError, SafetensorError) as error:
            raise CacheError(f"{path} cannot be loaded: {error}.") from error
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, "1"):
            raise CacheError(f"{path} cannot be loaded: it holds no router that this kvprune saved.")
        try:
            saved, layers = json.loads(metadata["model"]), int(metadata["layers"])
            numbers = {int(name.removeprefix("layers.")): tensor for name, tensor in found.items()}
            if not isinstance(saved, dict) or not all(0 <= layer < layers < 10_000 for layer in numbers):
                raise ValueError("layers that it says it does not have")
            router = cls([numbers[each].tolist() if each in numbers else () for each in range(layers)], saved)
        except (KeyError, ValueError, RecursionError) as error:
            raise CacheError(f"{path} cannot be loaded: its router is damaged ({error}).") from error
        if model is not None:
            router.check(model, trust_model=trust_model)
        router.trusted = trust_model
        return router

    def check(self, model: Any, *, trust_model: bool = False) -> None:
        """Raise CacheError unless it is of this model, where it is known of which it is. trust_model: as of `load`."""
        if self.model is None:
            return
        if told := differences(self.model, fingerprint(model), trust_model=trust_model):
            raise CacheError(f"this router is of another model than this {type(model).__name__}: {'; '.join(told)}.")


def _unrouted(policy: Any) -> Any:
    if not (hasattr(policy, "sparsity") and hasattr(policy, "router")):
        raise PolicyError(f"{policy} lets no token go past a layer: give an FTP, such as FTP(((0.3, 0.3),)).")
    return replace(policy, router=None)
