"""How a prompt filter comes before the layers: a forward hook on the decoder, which changes what the decoder is given.

The hook does nothing but for a `PrunedCache` whose policy filters. Then it runs the filter pass, where the step is
longer than the budget, and replaces ids or embeddings, mask and position ids by those of the chosen tokens. At every
later step it turns the positions that transformers counts, those of the whole prompt, into those of the chosen tokens.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from kvprune.cache.columns import Columns, Reading
from kvprune.cache.models import CACHE_ARGUMENT
from kvprune.cache.pruned_cache import PrunedCache
from kvprune.cache.registration import PendingMask
from kvprune.cache.selection import FilteredStep, Selection
from kvprune.errors import CacheError, KVPruneError, UnsupportedModelError
from kvprune.passes.choosing import Chooser
from kvprune.passes.filter_pass import FilterPass
from kvprune.table.rows import EMPTY

# Arguments of decoders that hold something for every column, [B, L, ...].
_PER_TOKEN = ("input_ids", "inputs_embeds", "token_type_ids", "per_layer_inputs")
# What is made anew for the chosen tokens.
_REPLACED = ("attention_mask", "position_ids", "cache_position")
_installing = threading.Lock()


def install(model: Any) -> None:
    """Register the hook on the model's decoder, once. Raises UnsupportedModelError where it could not work."""
    decoder = model.get_decoder()
    if decoder is not model and not model.can_generate():
        raise UnsupportedModelError(
            f"{type(model).__name__} has a head that reads every token of a prompt, and a prompt filter leaves it the "
            "chosen ones. Use a policy that evicts after the prompt instead, such as SnapKV."
        )
    known = inspect.signature(decoder.forward).parameters
    if "position_ids" not in known or CACHE_ARGUMENT not in known:
        raise UnsupportedModelError(
            f"the decoder of {type(model).__name__}, {type(decoder).__name__}, takes no position_ids, so the tokens "
            "that a prompt filter chooses could not be given the positions of a whole prompt. Use a policy that evicts "
            "after the prompt instead, such as SnapKV."
        )
    with _installing:
        if shorten not in decoder._forward_pre_hooks.values():
            # First, so that a replay notes what is left of a prompt.
            decoder.register_forward_pre_hook(shorten, with_kwargs=True, prepend=True)
        if decoder is not model and check_head not in model._forward_pre_hooks.values():
            model.register_forward_pre_hook(check_head, with_kwargs=True)


def check_head(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook on the whole model: raise for what its head would make of every token of a prompt that is shortened."""
    cache = _filtering(args, kwargs)
    if cache is None:
        return
    for name, value in kwargs.items():
        every = isinstance(value, Tensor) and ("label" in name or name == "logits_to_keep")
        # Indices of logits say nothing of how long the prompt is.
        if every and (name == "logits_to_keep" or _exceeds(cache.prompt_filter, value.shape[-1])):
            raise cache.misused(
                f"{name}= refers to every token of a prompt, and a prompt filter leaves the chosen ones: leave it out, "
                "or use a policy that evicts after the prompt, such as SnapKV"
            )


def _filtering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The cache among arguments whose policy filters prompts, or None."""
    caches = (each for each in (*args, *kwargs.values()) if isinstance(each, Cache))
    return next((each for each in caches if getattr(each, "prompt_filter", None) is not None), None)


def _exceeds(policy: Chooser, count: int) -> bool:
    """Whether so many tokens of a prompt are too many, as far as one can tell."""
    most = policy.capacity(count)
    return most is None or count > most


def shorten(decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hook: new arguments for the decoder, or None to leave them as they are."""
    cache = _filtering(args, kwargs)
    if cache is None:
        return None
    given = dict(kwargs)
    if args:
        given |= dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False))
    cache.expect(None, None)
    if not torch.compiler.is_dynamo_compiling():
        cache.check_uninterrupted()
    inputs, held = _inputs(given), cache.layers[cache.pruned_layers[0]].table
    if inputs is None or (held is not None and held.batch_size != len(inputs)):
        return None  # the model has an error for this
    step = _Step(decoder, cache, given)
    arguments = step.filtered() if step.is_too_long() else None
    return (), arguments or step.continued()


class _Step:
    """One forward pass of a decoder, and what its arguments become."""

    def __init__(self, decoder: torch.nn.Module, cache: PrunedCache, given: dict[str, Any]) -> None:
        """given: the arguments, by name."""
        self.decoder, self.cache, self.given = decoder, cache, given
        self.policy, self.filter_layer = cast(Chooser, cache.prompt_filter), cast(int, cache.filter_layer)
        inputs = cast(Tensor, _inputs(given))
        self.batch, self.length = inputs.shape[:2]
        self.device = inputs.device
        self.layer = cache.layers[cache.pruned_layers[0]]
        self.before: tuple[int, ...] = self.layer.tokens or (0,) * self.batch
        self.past = self.layer.selection or Selection(self.filter_layer, ((),) * self.batch, (0,) * self.batch)
        self.columns: Columns | None = None
        self.valid = self._valid()

    def _valid(self) -> Tensor | None:
        """Which of the new columns are no padding, bool `[B, L]`; None if all are."""
        mask = self.given.get("attention_mask")
        if isinstance(mask, PendingMask):
            mask = mask.padding
        if mask is None or torch.compiler.is_dynamo_compiling():  # a compiled step is given none if it says anything
            return None
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < self.length:
            raise self.cache.misused(
                "its attention mask is not a padding mask [batch, tokens] that covers the new tokens, which is what a "
                "prompt filter needs"
            )
        reading = Reading(mask)
        try:
            reading.look(self.layer.columns, self.layer.seen, self.length, self.device, self.batch)
        except CacheError as error:
            raise self.cache.misused(str(error)) from None
        if reading.looked is None:
            return None
        if reading.looked.past is not None:
            raise self.cache.misused(
                "its attention mask hides tokens that were visible before, and where a prompt was filtered nobody "
                "knows their columns any more: use a policy that evicts after the prompt, such as SnapKV, for "
                "conversations in which something is hidden later"
            )
        self.columns = reading.looked.columns
        self.cache.expect(None, None, self.columns)
        return reading.looked.valid

    def _earlier_columns(self) -> Tensor | None:
        """Which columns that the layers have seen are no padding, bool `[B, C]`; None if all are, or no one asks."""
        mask = self.given.get("attention_mask")
        if self.layer.selection is not None:
            return self.past.columns
        if mask is None or not self.cache.is_hybrid or mask.shape[1] < self.layer.seen + self.length:
            return None
        earlier = mask[:, -self.layer.seen - self.length : -self.length].bool().to(self.device)
        return None if bool(earlier.all()) else earlier

    def is_too_long(self) -> bool:
        """Whether it is a prompt that does not fit into the budget, as far as one can tell."""
        if self.length == 1 or self.layer.record_past:  # a draft needs the logits of all its tokens
            return False
        return any(_exceeds(self.policy, count) for count in self._tokens())

    def _tokens(self) -> tuple[int, ...]:
        return (self.length,) * self.batch if self.valid is None else tuple(self.valid.sum(1).tolist())

    def _each(self, counts: tuple[int, ...]) -> int | Tensor:
        """One number per sequence to combine with `[B, L]`: an int where all are equal, else a LongTensor `[B, 1]`."""
        if counts.count(counts[0]) == len(counts):
            return counts[0]
        return torch.tensor(counts, device=self.device)[:, None]

    # -- a prompt that is filtered -----------------------------------------------------------------------------------

    def filtered(self) -> dict[str, Any] | None:
        """The arguments for the chosen tokens alone; None if all are chosen."""
        self._check_known()
        arguments = {name: value for name, value in self.continued().items() if value is not self.cache}
        arguments |= {"use_cache": True, "output_attentions": False, "output_hidden_states": False}
        scratch = FilterPass(self.cache, self.policy, self.filter_layer, self.valid)
        columns = scratch.run(self.decoder.forward, arguments)
        return None if columns is None else self._chosen([each.to(self.device) for each in columns])

    def _check_known(self) -> None:
        """Raise for arguments that hold something for every token in a way that nothing is known of."""
        positions = self.given.get("position_ids")
        if positions is not None and positions.ndim != 2:
            raise self._positions_of_another_kind(positions)
        for name, value in self.given.items():
            if name in _REPLACED or (name in _PER_TOKEN and _is_per_token(value, self.batch, self.length)):
                continue
            if any(self._has_tokens(each) for each in _tensors(value)):
                raise self.cache.misused(
                    f"its decoder was given {name}, which holds something for every token of the prompt, and a prompt "
                    "filter does not know how to choose from it: use a policy that evicts after the prompt, such as "
                    "SnapKV",
                    UnsupportedModelError,
                )

    def _has_tokens(self, value: Tensor) -> bool:
        size = getattr(getattr(self.decoder, "config", None), "hidden_size", None)
        is_states = value.is_floating_point() and value.shape[-1:] == (size,)
        return self.length in (value.shape[:-1] if is_states else value.shape)

    def _positions_of_another_kind(self, positions: Tensor) -> KVPruneError:
        return self.cache.misused(
            f"its position_ids have the shape {tuple(positions.shape)}; a prompt filter takes [batch, tokens]: use a "
            "policy that evicts after the prompt, such as SnapKV",
            UnsupportedModelError,
        )

    def _chosen(self, columns: list[Tensor]) -> dict[str, Any]:
        index, real = _left_padded(columns)
        sequences = torch.arange(self.batch, device=self.device)[:, None]
        arguments = {name: value for name, value in self.given.items() if name != "cache_position"}
        for name in _PER_TOKEN:
            value = arguments.get(name)
            if _is_per_token(value, self.batch, self.length):
                arguments[name] = value[sequences.to(value.device), index.to(value.device)]

        first = self._each(self.before)
        ranks = self._ranks().expand(self.batch, -1).gather(1, index)
        positions = (first + ranks).masked_fill(~real, EMPTY)
        arguments["position_ids"] = (first - self._each(self.past.dropped) + real.cumsum(1) - 1).clamp(min=0)

        counts, tokens = [len(each) for each in columns], self._tokens()
        chosen = zip(self.past.positions, positions.tolist(), counts, strict=True)
        after = Selection(
            self.past.layer,
            tuple(earlier + tuple(row[len(row) - count :]) for earlier, row, count in chosen),
            tuple(a + b - c for a, b, c in zip(self.past.dropped, tokens, counts, strict=True)),
            self.past.skipped + self.length - real.shape[1],
            self._earlier_columns(),
        )
        valid = None if min(counts) == max(counts) else real
        self._expect(arguments, FilteredStep(positions, tokens, self.length), after, valid, real.shape[1])
        return arguments

    def _ranks(self) -> Tensor:
        """How many of its sequence's new tokens come before each column, `[B or 1, L]`."""
        return torch.arange(self.length, device=self.device)[None] if self.valid is None else self.valid.cumsum(1) - 1

    # -- every other step --------------------------------------------------------------------------------------------

    def continued(self) -> dict[str, Any]:
        """The arguments for all columns of this step, which may come behind a prompt that was filtered."""
        if self.layer.selection is None:
            return self.given
        arguments = {name: value for name, value in self.given.items() if name != "cache_position"}
        positions, dropped = arguments.get("position_ids"), self._each(self.past.dropped)
        if positions is None:
            positions = self._each(self.before) + self._ranks()
        elif positions.ndim != 2:
            raise self._positions_of_another_kind(positions)
        arguments["position_ids"] = (positions - dropped).clamp(min=0)
        self._expect(arguments, None, self.past, self.valid, self.length)
        return arguments

    def _expect(
        self, arguments: dict[str, Any], step: FilteredStep | None, after: Selection, valid: Tensor | None, columns: int
    ) -> None:
        """Tell the cache what comes, and give layers that it does not prune a mask over what they have seen."""
        if self.cache.is_hybrid:
            after = after.extended(self.layer.seen - self.past.skipped, valid, columns, self.batch)
            arguments["attention_mask"] = None if after.columns is None else after.columns.long()
        elif step is not None:
            arguments["attention_mask"] = None if valid is None else valid.long()
        self.cache.expect(step, after, self.columns)


def _is_per_token(value: Any, batch: int, length: int) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.shape[:2] == (batch, length)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in an argument, however it is nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _inputs(given: dict[str, Any]) -> Tensor | None:
    return given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]


def _left_padded(columns: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Columns of all sequences as one index, LongTensor `[B, k]`, and which of it are no padding, bool `[B, k]`."""
    width = max(len(each) for each in columns)
    index = torch.stack([F.pad(each, (width - len(each), 0)) for each in columns])
    counts = torch.tensor([len(each) for each in columns], device=index.device)
    return index, torch.arange(width, device=index.device) >= width - counts[:, None]
