"""Any policy with any settings, and any chain of policies, as strategies of hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from kvprune import Adaptive, Chain, Everywhere, Policy, Uniform
from kvprune.policies import (
    A2SF,
    H2O,
    KIVI,
    OSCAR,
    TOVA,
    Bits,
    CriticalKV,
    DropKV,
    ExpectedAttention,
    Full,
    GemFilter,
    KeyDiff,
    Keyformer,
    Knorm,
    KVCrush,
    Leverage,
    Random,
    SnapKV,
    Spectral,
    StreamingLLM,
    TriAttention,
    TurboQuant,
    ZipCache,
)

ROOM = 10_000

groups = st.sampled_from(["mean", "max"])
kernels = st.sampled_from([1, 3, 5, 7])
intervals = st.one_of(st.just(1), st.none(), st.integers(2, 5))
seeds = st.integers(0, 2**40)
shares = st.integers(0, 20).map(lambda twentieths: twentieths / 20)
fractions = st.integers(1, 20).map(lambda twentieths: twentieths / 20)
bits = st.sampled_from([2, 3, 4, 8])
temperatures = st.sampled_from([0.5, 1.0, 2.5])


between_heads = st.sampled_from([Uniform(), Uniform(), Adaptive(0), Adaptive(0.4), Everywhere(0.2)])


def budgets(least: int, *, in_bytes: bool) -> st.SearchStrategy[Any]:
    """A fraction; a number of tokens, near to what is always kept or above any length; or bytes."""
    tokens = st.one_of(st.integers(least, least + 15), st.just(ROOM))
    size = st.integers(10, 60).map(lambda thousands: f"{thousands}kB")
    return st.one_of(fractions, tokens, size) if in_bytes else st.one_of(fractions, tokens)


@st.composite
def retention(
    draw: st.DrawFn, *, in_bytes: bool = True, recent: st.SearchStrategy[Any] | None = None, **others: Any
) -> dict[str, Any]:
    """Settings that all evicting policies share, and others."""
    sinks = draw(st.integers(0, 3))
    window = draw(st.one_of(st.integers(0, 5), st.sampled_from([0.0, 0.1, 0.25, 0.5])) if recent is None else recent)
    least = sinks + (window if isinstance(window, int) else 5)  # so many as half of the budget, and the sinks, take
    budget = draw(budgets(max(1, least), in_bytes=in_bytes))
    settings = st.fixed_dictionaries(
        {"share": between_heads, "interval": intervals, "group": groups, "kernel_size": kernels, **others}
    )
    drawn = draw(settings)
    ahead = draw(st.none() | st.integers(0, drawn["kernel_size"] - 1))
    return {"budget": budget, "sinks": sinks, "recent": window, "ahead": ahead, **drawn}


def a2sf(**settings: Any) -> st.SearchStrategy[Policy]:
    factors = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.3, 0.99))
    return retention(forgetting_factor=factors, **settings).map(lambda drawn: A2SF(**drawn))


def h2o(**settings: Any) -> st.SearchStrategy[Policy]:
    return retention(**settings).map(lambda drawn: H2O(**drawn))


def tova(**settings: Any) -> st.SearchStrategy[Policy]:
    return retention(**settings).map(lambda drawn: TOVA(**drawn))


def streaming_llm(**settings: Any) -> st.SearchStrategy[Policy]:
    return retention(recent=st.just(1), **settings).map(lambda drawn: StreamingLLM(**drawn))


keyformer = retention(
    tau_init=temperatures,
    tau_end=temperatures,
    generation_length=st.integers(1, 10),
    noise=st.sampled_from([0, 1]),
    seed=seeds,
    frozen_keys=st.booleans(),
).map(lambda drawn: Keyformer(**drawn))
snapkv = st.integers(1, 6).flatmap(
    lambda window: retention(
        recent=st.integers(0, window), window=st.just(window), pooling=st.sampled_from(["max", "avg"])
    ).flatmap(lambda drawn: st.sampled_from([SnapKV, CriticalKV, DropKV]).map(lambda kind: kind(**drawn)))
)

zipcache = st.builds(
    lambda widths, **drawn: ZipCache(high_bits=max(widths), low_bits=min(widths), **drawn),
    st.tuples(bits, bits),
    salient=shares,
    buffer=st.integers(1, 12),
    probe_recent=shares,
    probe_random=shares,
    normalizer=st.sampled_from(["probes", "official"]),
    group_size=st.one_of(st.none(), st.integers(1, 8)),
    kernel_size=kernels,
    rotate=st.booleans(),
    group=groups,
    seed=seeds,
)
kivi = st.one_of(
    st.builds(KIVI, bits=bits, group_size=st.integers(1, 8), residual=st.integers(0, 8), rotate=st.booleans()),
    st.builds(
        KIVI,
        bits=st.sampled_from([4, 8]),
        group_size=st.integers(1, 8),
        residual=st.integers(0, 8),
        theta=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    ),
)
ageing = st.builds(
    lambda kind, **drawn: kind(**drawn),
    st.sampled_from([Spectral, Spectral, OSCAR, TurboQuant]),
    bits=bits,
    value_bits=st.one_of(st.none(), bits),
    sinks=st.integers(0, 2),
    residual=st.integers(0, 8),
    edge_layers=st.integers(0, 1),
    edge_bits=st.sampled_from([3, 16]),
)


@st.composite
def gemfilter(draw: st.DrawFn) -> GemFilter:
    first, last = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    return GemFilter(
        draw(budgets(max(1, first + last), in_bytes=False)),
        layer=draw(st.sampled_from([None, 0])),
        kernel_size=draw(kernels),
        keep_first=first,
        keep_last=last,
    )


by_keys = st.one_of(
    retention().map(lambda drawn: Knorm(**drawn)),
    retention().map(lambda drawn: KeyDiff(**drawn)),
    retention(seed=seeds).map(lambda drawn: Random(**drawn)),
    retention(covariance=st.booleans(), future=st.integers(1, 64)).map(lambda drawn: ExpectedAttention(**drawn)),
    retention(distances=st.integers(1, 17)).map(lambda drawn: TriAttention(**drawn)),
    retention().map(lambda drawn: Leverage(**drawn)),
)
valued = st.booleans()
evicting = st.one_of(
    a2sf(value_aware=valued), h2o(), tova(value_aware=valued), streaming_llm(), keyformer, snapkv, by_keys
)


@st.composite
def chains(draw: st.DrawFn) -> Policy:
    """A policy or a chain: at most one prompt filter, which comes first, and at most one that packs, which is last."""
    links: list[Policy] = draw(st.lists(st.one_of(evicting, evicting.map(lambda drawn: drawn | KVCrush())), max_size=2))
    if draw(st.sampled_from([False, False, True])):
        links.insert(0, draw(gemfilter()))
    if draw(st.booleans()):
        links.append(draw(st.one_of(zipcache, kivi, ageing)))
    if len(links) > 1:
        return Chain(tuple(links))
    return links[0] if links else Full()


@st.composite
def bits_policies(draw: st.DrawFn) -> Policy:
    """`Bits` by any scores, alone or behind a policy that evicts."""
    score = draw(st.one_of(a2sf(in_bytes=False), h2o(in_bytes=False), snapkv, tova(in_bytes=False), by_keys))
    policy = Bits(
        draw(st.one_of(fractions, st.integers(20, 100), st.integers(6, 40).map(lambda thousands: f"{thousands}kB"))),
        score=score,
        power=draw(st.sampled_from([0.5, 1, 2])),
        widths=tuple(draw(st.lists(bits, max_size=4, unique=True))),
        share=draw(between_heads),
        sinks=draw(st.integers(0, 2)),
        recent=draw(st.integers(0, 3)),
        interval=draw(st.sampled_from([None, None, 1, 3, 5])) if score.scores_generated else None,
        aged_bits=draw(bits),
    )
    return H2O(14, sinks=0, recent=2) | policy if draw(st.sampled_from([False, False, True])) else policy
