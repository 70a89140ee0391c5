"""Tiny models with random weights, one for each model family, and the few things that tests do with them.

Weights are drawn wide, so that attention is far from uniform and no greedy choice is decided by rounding. No model can
end a sequence: every generation has the length that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3NextConfig,
)

from kvprune import Policy, PrunedCache, Step, TokenTable
from kvprune.cache.models import cache_argument

VOCAB = 97
PAD = 0
WINDOW = 16
LONGEST = 512

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,  # a tied head would only repeat the token it was given
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
_HEAD_DIM = {**_GROUPED, "head_dim": 8}
_HYBRID = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_HEAD_DIM),
    "qwen3-hybrid": lambda: Qwen3Config(
        **{**_HEAD_DIM, "num_hidden_layers": 3},
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=None),
    "mistral-sliding": lambda: MistralConfig(**_GROUPED, sliding_window=WINDOW),
    "gemma2": lambda: Gemma2Config(
        **_HEAD_DIM,
        **_HYBRID,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        attn_implementation="eager",  # sdpa left the soft cap out in transformers 5.17
    ),
    "gemma3": lambda: Gemma3TextConfig(**_HEAD_DIM, **_HYBRID, query_pre_attn_scalar=8),
    "gpt-neox": lambda: GPTNeoXConfig(**_SHAPE),
    "opt": lambda: OPTConfig(**_SHAPE, ffn_dim=64, word_embed_proj_dim=32, init_std=0.2),
    "gpt2": lambda: GPT2Config(**_SHAPE),
    "phi3": lambda: Phi3Config(**_GROUPED),
    "mixtral": lambda: MixtralConfig(**_GROUPED, sliding_window=None, num_local_experts=2),
    "gpt-oss": lambda: GptOssConfig(
        **{**_HEAD_DIM, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
        **_HYBRID,
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
}
if hasattr(transformers, "Gemma4TextConfig"):  # not in transformers 5.17; its layers differ in their heads
    CONFIGS["gemma4"] = lambda: transformers.Gemma4TextConfig(
        **_HEAD_DIM,
        **_HYBRID,
        global_head_dim=16,
        num_global_key_value_heads=1,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCAB,
    )
if transformers.GPTJForCausalLM._can_set_attn_implementation():  # not before transformers 5.24
    CONFIGS["gpt-j"] = lambda: transformers.GPTJConfig(**_SHAPE, rotary_dim=4)
FAMILIES = tuple(CONFIGS)

_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 8,
}
_EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_ROTATED_IN_THREE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}


def _seeing(name: str, **vision: Any) -> PreTrainedConfig:
    """A model that sees, for prompts of text alone: its positions have three dimensions nevertheless."""
    text = {**_GROUPED, "rope_parameters": _ROTATED_IN_THREE}
    return getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config={"depth": 1, "num_heads": 2, **vision},
        **{f"{kind}_token_id": VOCAB - 1 - index for index, kind in enumerate(("image", "video", "vision_start"))},
        **{name: _SHAPE[name] for name in ("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")},
    )


UNUSUAL: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(**_GROUPED, **_EXPERTS),  # builds a sliding mask for no layer
    "lfm2": lambda: transformers.Lfm2Config(**_GROUPED, layer_types=["full_attention", "conv"]),
    "jamba": lambda: transformers.JambaConfig(
        **_GROUPED,
        attn_layer_period=2,
        attn_layer_offset=0,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    "bamba": lambda: transformers.BambaConfig(**_GROUPED, **_MAMBA, attn_layer_indices=[0]),
    "granite-hybrid": lambda: transformers.GraniteMoeHybridConfig(
        **_GROUPED,
        **_MAMBA,
        layer_types=["attention", "mamba"],
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=32,
    ),
    "qwen3-next": lambda: Qwen3NextConfig(
        **_HEAD_DIM,
        **_EXPERTS,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        layer_types=["full_attention", "linear_attention"],
    ),
    "qwen2-vl": lambda: _seeing("Qwen2VL", embed_dim=16, hidden_size=32),
    "qwen2.5-vl": lambda: _seeing("Qwen2_5_VL", hidden_size=16, intermediate_size=16, out_hidden_size=32),
}
"""Families whose masks, states or positions are their own; only tests/test_families.py runs all of them."""

STOCK_ONLY = ("mistral-sliding",)
"""Families without a layer that can be pruned."""


def build(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A new model of a family. The same arguments give the same weights."""
    config = (CONFIGS | UNUSUAL)[family]()
    for name, value in overrides.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        model = auto.from_config(config, dtype=dtype)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):  # attention sinks of GPT-OSS
                torch.nn.init.normal_(parameter)
    return model.eval()


@cache
def shared(family: str = "llama") -> PreTrainedModel:
    """A model that all tests use together, with pruned caches."""
    return build(family)


@cache
def stock(family: str = "llama") -> PreTrainedModel:
    """The same model, which kvprune never touches."""
    return build(family)


@cache
def linear_hybrid() -> PreTrainedModel:
    """A model with linear attention, whose layers hold states."""
    config = Qwen3NextConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"] * 2, eos_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def token_ids(*shape: int, seed: int = 0) -> Tensor:
    """Random ids, none of which is the padding token."""
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: Sequence[int], *, seed: int = 0, width: int | None = None) -> dict[str, Tensor]:
    """A batch of random prompts of these lengths, as the arguments of a model."""
    width = width or max(lengths)
    ids = token_ids(len(lengths), width, seed=seed)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}


def sequence(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One prompt of a batch, without its padding."""
    real = batch["attention_mask"][row].bool()
    return {name: tensor[row][real][None] for name, tensor in batch.items()}


def generate(model: PreTrainedModel, batch: dict[str, Tensor], new_tokens: int = 10, **settings: Any) -> Tensor:
    """Ids of the prompt and `new_tokens` more, greedy if the settings do not say otherwise."""
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, **settings}
    return model.generate(**batch, **settings)


def positions_of(mask: Tensor) -> Tensor:
    """What `generate` makes of an attention mask: positions that leave padding out."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def stepwise(
    model: PreTrainedModel, batch: dict[str, Tensor], cache: Any, sizes: Iterable[int], *, begin: int = 0
) -> Iterator[Tensor]:
    """Feed a batch, from column `begin` on, in steps of so many tokens; logits `[B, size, vocab]` after each."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = positions_of(mask)
    for size in sizes:
        end = begin + size
        yield model(
            ids[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, begin:end],
            **cache_argument(cache),
        ).logits
        begin = end


def feed(
    model: PreTrainedModel, batch: dict[str, Tensor], cache: Any, sizes: Iterable[int], *, begin: int = 0
) -> Tensor:
    """Logits `[B, tokens, vocab]` of all these steps."""
    return torch.cat(list(stepwise(model, batch, cache, sizes, begin=begin)), dim=1)


def kept(cache: PrunedCache, layer: int, row: int = 0) -> list[list[int]]:
    """Positions that each KV head keeps of one sequence."""
    return [[position for position in head if position >= 0] for head in cache.kept_positions(layer)[row].tolist()]


def kept_everywhere(cache: PrunedCache, row: int = 0) -> list[list[list[int]]]:
    """The same for every pruned layer."""
    return [kept(cache, layer, row) for layer in cache.pruned_layers]


def rows(cache: PrunedCache, layer: int, row: int = 0) -> dict[str, Tensor]:
    """The rows of one sequence, `[Hkv, rows, ...]`, with all their columns, in the order of their positions.

    Of a table with packed rows, keys and values are what they decode to, and `bits` says with how many; 0 for rows in
    full precision, which alone have columns of the buffer.
    """
    table = cache.layers[layer].table
    tensors = table.tensors() if not table.packed else decoded(table)
    positions = table.positions[row]
    count = int((positions[0] >= 0).sum())
    order = positions.argsort(dim=-1)[:, table.length - count :]
    heads = torch.arange(table.kv_heads)[:, None]
    return {name: tensor[row][heads, order] for name, tensor in tensors.items()}


def decoded(table: TokenTable) -> dict[str, Tensor]:
    """Every column of a table, `[B, Hkv, length, ...]`, with packed rows decoded."""
    first, loose = table.packed_length, slice(0, table.length - table.packed_length)
    tiers = [tier.decoded() for tier in table.packed]
    keys, values = zip(*tiers, (table.keys.float(), table.values.float()), strict=True)
    bits = [torch.full((len(tier),), tier.codec.bits) for tier in table.packed] + [torch.zeros(loose.stop)]
    columns = {"keys": torch.cat(keys, dim=2), "values": torch.cat(values, dim=2), "positions": table.positions}
    columns["bits"] = torch.cat(bits).expand_as(table.positions)
    for name, tensor in table.tensors().items():
        if name.startswith("column."):
            columns[name] = tensor[:, :, : table.length]
        elif name.startswith("buffer."):
            columns[name] = F.pad(tensor[:, :, loose], (first, 0))
    return columns


def assert_same_rows(
    cache: PrunedCache, other: PrunedCache, row: int = 0, other_row: int = 0, *, atol: float = 0, rtol: float = 0
) -> None:
    """Both caches keep the same tokens of a sequence, with the same keys, values and policy columns."""
    for layer in cache.pruned_layers:
        assert kept(cache, layer, row) == kept(other, layer, other_row)
        mine, theirs = rows(cache, layer, row), rows(other, layer, other_row)
        torch.testing.assert_close(mine, theirs, atol=atol, rtol=rtol)


def windows_are_recorded(family: str) -> None:
    """Skip where masks of layers with a sliding window do not fit their keys while these record the past."""
    if family == "qwen3-hybrid" and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
        pytest.skip("transformers 5.17 wants a crop after every step there")


def storage_nbytes(cache: PrunedCache) -> int:
    """Bytes of the storages behind every tensor that can be reached from a cache, but through its model."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors_in(cache, set())
    }
    model = cache._model()
    for tensor in () if model is None else (*model.parameters(), *model.buffers()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def _tensors_in(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        if thing.ndim and not isinstance(thing, torch.nn.Parameter):
            yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors_in(value, seen)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from _tensors_in(value, seen)
    elif isinstance(thing, Policy):
        assert not any(isinstance(getattr(thing, field.name), Tensor) for field in fields(thing))
    elif is_dataclass(thing) or type(thing).__module__.startswith(("kvprune", "transformers.cache_utils")):
        yield from _tensors_in(vars(thing), seen)


@dataclass(frozen=True)
class Spy(Policy):
    """Keeps everything, and notes of every step how many queries it brought and how many rows there were at its peak.

    Put it behind another policy: `A2SF(16) | Spy()`.
    """

    queries: list[int] = field(default_factory=list, compare=False)
    peaks: list[int] = field(default_factory=list, compare=False)

    def observe(self, table: TokenTable, step: Step) -> None:
        if step.layer == 0:
            self.queries.append(step.queries)
            self.peaks.append(table.rows)
