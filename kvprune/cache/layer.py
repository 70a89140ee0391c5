"""`PrunedLayer`: a layer of a `PrunedCache`, as transformers knows layers.

What it does at a forward pass is in `step.py`; here is what is asked of it in between.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from kvprune.attention.queries import Remembered
from kvprune.cache.columns import Columns, Past
from kvprune.cache.ledger import Ledger
from kvprune.cache.registration import NO_MASK, SOME_LENGTH, CacheLength
from kvprune.cache.selection import Selection
from kvprune.cache.step import LayerStep
from kvprune.cache.unread import Unread
from kvprune.errors import CacheError
from kvprune.state import Saved, State
from kvprune.table.kept_heads import KeptHeads
from kvprune.table.ragged import RaggedTable
from kvprune.table.tallies import Tallies
from kvprune.table.token_table import TokenTable


class PrunedLayer(LayerStep):
    """A layer of a `PrunedCache`: a token table, and the policies that rule it."""

    # -- what transformers asks ------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the table is made of the first step's keys and values."""

    @property
    def is_compileable(self) -> bool:
        """Whether a decode step changes no shape and never waits for the device: one graph serves all steps.

        So it is at the budget of a policy that evicts at every token, unless the past is recorded, the batch was
        reordered since the last step, the cache lives on another device than the model, or sequences keep different
        numbers of rows.
        """
        if self.steady is None or not self._of_inference_mode:
            return self.steady is not None
        return torch.compiler.is_dynamo_compiling() or torch.is_inference_mode_enabled()  # it cannot trace the latter

    def get_seq_length(self) -> int:
        if self.steady is not None and torch.compiler.is_dynamo_compiling():
            return self.steady.seen  # type: ignore[return-value]  # as StaticLayer does, transformers 5.23
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if torch.compiler.is_dynamo_compiling():  # which cannot make such an int of a symbolic one (torch 2.13)
            return (NO_MASK if self.steady is not None and query_length == 1 else SOME_LENGTH), 0
        if self.steady is not None and self.steady.ahead:  # to count would be to wait, and no mask depends on it
            return CacheLength(query_length), 0
        return CacheLength(self.seen + query_length), 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Take this step's keys `[B, Hkv, L, D]` and values; they become rows when the attention runs."""
        if self.table is not None:
            self.table.check_step(key_states, value_states, self.kv_heads)
        self.incoming = (key_states, value_states)
        return key_states, value_states

    def _hide(self, past: Past, table: TokenTable) -> None:
        """Drop the rows of tokens that a mask hides; the others move up, as if those had been padding all along."""
        self.leave_steady()
        moved = past.on(table.positions.device)
        table.move(moved)
        if self.remembered is not None:
            self.remembered = self.remembered.moved(moved)
        self.ledger = self.ledger and self.ledger.moved(past)
        self.prompt_tokens, self.tokens = past.left(self.prompt_tokens), past.left(self.tokens)
        self.last_eviction = self.seen

    # -- rolling back ----------------------------------------------------------------------------------------------

    def activate_past_recording(self) -> None:
        """From now on nothing is evicted in a step until `crop` has said how many of its tokens were accepted.

        Of a longer step, the newest 128 tokens can be taken back as if they had never come; what queries before them
        added to the scores stays there.
        """
        self.leave_steady()
        self.record_past = True

    def accept(self) -> None:
        """The model goes on without a crop: all was accepted, and several tokens were a prompt, not a draft."""
        if self.undecided is not None:
            self.settle_mode()
            self.undecided.prefill |= len(self.undecided.queries) > 1
            self._commit()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens; 0 only ends the step that waits while the past is recorded.

        Without recording, what the forgotten queries added to the scores stays there.

        Raises CacheError for a positive number, and where rows were evicted since: those cannot come back.
        """
        self.check_crop(tokens_to_remove)
        self.settle_mode()
        if self.table is None:
            return
        remove = -tokens_to_remove
        if remove:
            newest = slice(max(0, self.table.length - remove), None)
            dropped = (self.table.positions[:, 0, newest] >= 0).sum(-1).tolist()
            self.table.drop_newest(remove)
            self.seen -= remove
            self.tokens = tuple(a - b for a, b in zip(self.tokens, dropped, strict=True))
            self.prompt_tokens = tuple(min(a, b) for a, b in zip(self.prompt_tokens, self.tokens, strict=True))
            self.generated = max(0, self.generated - max(dropped))
            if self.undecided is None or len(self.undecided.queries) <= remove:
                self.remembered = None  # it may hold queries that are taken back
            self.selection = self.selection and self.selection.crop(remove)
            self.unread = self.unread and self.unread.crop(remove)
            self.ledger = self.ledger and self.ledger.crop(self.tokens)
            self.columns = self.columns.crop(self.seen)
        if self.undecided is not None:
            left = len(self.undecided.queries) - remove
            if left > 0:
                self.undecided.queries = self.undecided.queries.part(0, left)
                self._commit()
            else:
                self.undecided = None

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise CacheError if `crop` could not do this; changes nothing."""
        left = self.seen + tokens_to_remove
        if tokens_to_remove > 0:
            raise CacheError(f"crop takes minus the number of tokens to remove: write crop(-{tokens_to_remove}).")
        if left < 0:
            raise CacheError(f"cannot remove {-tokens_to_remove} tokens: the cache has seen only {self.seen}.")
        if left < self.last_eviction:
            raise CacheError(
                f"cannot crop to {left} tokens: rows were evicted when the cache had seen {self.last_eviction}, and "
                "they cannot come back. Call activate_past_recording() before steps that you may want to take back, "
                "or keep a fork() of the cache."
            )

    # -- the batch changes -----------------------------------------------------------------------------------------

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.table is not None:
            self.batch_select_indices(torch.arange(self.table.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, in this order; a sequence may come several times."""
        if self.table is None:
            return
        self.settle_mode()
        self.leave_steady()  # the tensors that graphs know are gone
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(1)
        self.table.select_batch(indices)
        self.tallies = self.tallies.select_batch(indices)
        if len({*zip(self.tokens, self.prompt_tokens, strict=True)}) == 1:  # no need to wait for the device
            self.tokens, self.prompt_tokens = self.tokens[:1] * len(indices), self.prompt_tokens[:1] * len(indices)
        else:
            rows = indices.tolist()
            self.tokens = tuple(self.tokens[row] for row in rows)
            self.prompt_tokens = tuple(self.prompt_tokens[row] for row in rows)
        if self.remembered is not None:
            self.remembered = self.remembered.select_batch(indices)
        if self.undecided is not None:
            self.undecided.queries = self.undecided.queries.select_batch(indices)
        self.selection = self.selection and self.selection.select_batch(indices)
        self.unread = self.unread and self.unread.select_batch(indices)
        self.ledger = self.ledger and self.ledger.select_batch(indices)
        self.kept_heads = self.kept_heads and self.kept_heads.select_batch(indices)
        self.columns = self.columns.select_batch(indices)

    def fork(self) -> PrunedLayer:
        """An independent copy: every tensor is copied, settings are shared."""
        self.settle_mode()
        self.catch_up()
        other = copy.copy(self)
        other.table = self.table and self.table.fork()
        other.tallies = self.tallies.clone()
        other.remembered = self.remembered and self.remembered.clone()
        other.selection = self.selection and self.selection.clone()
        other.unread = self.unread and self.unread.clone()
        other.ledger = self.ledger and self.ledger.clone()
        other.kept_heads = self.kept_heads and self.kept_heads.clone()
        if self.undecided is not None:
            queries = self.undecided.queries
            other.undecided = replace(self.undecided, queries=queries.part(0, len(queries)))
        other.steady = None
        if self.steady is not None:
            other._enter_steady(other.table)  # type: ignore[arg-type]
        return other

    # -- saved and restored ----------------------------------------------------------------------------------------

    _COUNTS = ("seen", "generated", "last_eviction")

    def state(self) -> State:
        """Everything but the settings. Raises CacheError while a step waits for `crop`."""
        if self.undecided is not None:
            raise CacheError(
                "the past is being recorded, and the newest step is neither accepted nor taken back, so there is "
                "nothing to save yet: call crop(0) to accept all of its tokens, or crop(-n) to take n back."
            )
        state = State({name: getattr(self, name) for name in self._COUNTS})
        state.facts |= {"tokens": self.tokens, "prompt_tokens": self.prompt_tokens}
        state.facts |= self.columns.facts()
        state.facts |= {"record_past": self.record_past, "steady": self.steady is not None}
        state.add("table", None if self.table is None else self.table.state())
        if self.tallies:  # other caches are saved as they were before there were any
            state.add("tallies", self.tallies.state(self.query_heads))
        state.add("remembered", None if self.remembered is None else self.remembered.state())
        state.add("selection", None if self.selection is None else self.selection.state())
        state.add("unread", None if self.unread is None else self.unread.state())
        if self.ledger is not None:
            state.add("ledger", self.ledger.state())
        if self.kept_heads is not None:
            state.add("kept_heads", self.kept_heads.state())
        return state

    def restore(self, saved: Saved) -> None:
        """Take over a `state`; this layer is new. Raises CacheError for one that this layer cannot have."""
        self.settle_mode()
        self.seen = saved.count("seen")
        self.generated, self.last_eviction = (saved.count(name, self.seen) for name in self._COUNTS[1:])
        self.record_past, steady = saved.flag("record_past"), saved.flag("steady")
        table, remembered = saved.part("table", self.home), saved.part("remembered", self.home)
        selection, unread = saved.part("selection"), saved.part("unread")
        if table is None:
            if self.seen:
                raise saved.refused(f"has seen {self.seen} tokens, and has no table")
            return
        self.tokens = saved.counts("tokens", self.seen)
        self.prompt_tokens = saved.counts("prompt_tokens", self.seen, length=len(self.tokens))
        if "heads" in table.facts:
            self.table = RaggedTable.restored(table, len(self.tokens), lambda part: self._restored_table(part, 1))
        else:
            self.table = self._restored_table(table, len(self.tokens))
        self.is_initialized = True
        if self.planner.tallies(1, 1, 1):
            self._restore_tallies(saved.part("tallies", self.home), self.table)
        self.columns = Columns.restored(saved, self.seen, self.tokens)
        if remembered is not None:
            heads, dim = (self.table.batch_size, self.table.kv_heads), self.table.keys.shape[3]
            self.remembered = Remembered.restored(remembered, self.planner.query_window(True) - 1, heads, dim)
        if selection is not None:
            self.selection = Selection.restored(selection, self.seen, self.tokens)
        if unread is not None:
            self.unread = Unread.restored(unread, len(self.tokens), self.seen)
        if "ledger" in saved.facts and (ledger := saved.part("ledger")) is not None:
            self.ledger = Ledger.restored(ledger, self.tokens, self.planner.pruned_layers)
        if "kept_heads" in saved.facts and (left := saved.part("kept_heads", self.home)) is not None:
            self.kept_heads = KeptHeads.restored(left, len(self.tokens), self.table.kv_heads)
        if steady:
            if not self.planner.static_decode or self.record_past:
                raise saved.refused("is said to be steady, which the policy never is")
            self._enter_steady(self.table)

    def _restore_tallies(self, saved: Saved | None, table: TokenTable) -> None:
        if saved is None:
            raise CacheError("this file lacks the tallies of its policy: save the cache again.")
        self.query_heads = saved.count("query_heads", least=1)
        self.tallies = Tallies.restored(saved, self._tally_shapes(table), table.batch_size)

    def _restored_table(self, saved: Saved, sequences: int) -> TokenTable:
        (shape, dtype), (value_shape, value_dtype) = saved.numbers("keys"), saved.numbers("values")
        batch, heads, rows, key_dim = shape
        value_dim = value_shape[3]
        alike = value_shape == (batch, heads, rows, value_dim) and value_dtype == dtype
        if not alike or batch != sequences or not all((batch, heads, key_dim, value_dim)):
            raise saved.refused(f"has keys of shape {list(shape)} and values of shape {list(value_shape)}")
        none = torch.empty(batch, heads, 0, key_dim + value_dim, dtype=dtype, device=saved.device)
        table = self.new_table(none[..., :key_dim], none[..., key_dim:], none[..., 0], dense=True)
        table.restore(saved, self.planner.codecs, max(self.tokens))
        if table.rows > self.seen:
            raise saved.refused(f"has {table.rows} rows of {self.seen} tokens")
        return table

    # -- what it holds ---------------------------------------------------------------------------------------------

    def kept_positions(self) -> Tensor:
        """`[B, Hkv, rows]` int64, ascending, -1 for empty rows; rows that are empty everywhere are left out."""
        if self.table is None:
            return torch.empty(0, 0, 0, dtype=torch.int64)
        positions = self.table.positions.long().sort(dim=-1).values
        positions = positions[:, :, int((positions < 0).sum(-1).min()) :]
        return positions if self.kept_heads is None else self.kept_heads.positions(positions)

    @property
    def kv_heads(self) -> int:
        """KV heads that the model gives it, of which some may have stopped before this layer; 0 if it is empty."""
        if self.kept_heads is not None:
            return self.kept_heads.total
        return 0 if self.table is None else self.table.kv_heads

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the keys and values that a dense layer would hold for the same tokens."""
        if self.table is None:
            return 0
        return self.seen * self.table.kv_token_bytes // self.table.kv_heads * self.kv_heads

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor this layer holds."""
        if self.table is not None:
            self.table.settle()  # copies of columns that somebody has looked at are not held
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        held = [] if self.table is None else list(self.table.tensors().values())
        held += self.tallies.values()
        if self.remembered is not None:
            held += [self.remembered.states, self.remembered.positions]
        if self.steady is not None:
            held.append(self.steady.counts)
        if self.undecided is not None:
            held += self.undecided.queries.tensors()
        if self.selection is not None and self.selection.columns is not None:
            held.append(self.selection.columns)
        for part in (self.unread, self.ledger):
            held += [] if part is None else part.tensors()
        if self.kept_heads is not None:
            held.append(self.kept_heads.numbers)
        return held
