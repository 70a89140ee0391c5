"""In which order policies may stand in a chain, and which of them cannot stand in one."""

from __future__ import annotations

from typing import Any

from kvprune.errors import PolicyError


def check_order(links: tuple[Any, ...]) -> None:
    """Raise PolicyError for an order of links that has no meaning."""
    stopping = next((link for link in links if link.stops_tokens), None)
    if stopping is not None:
        _check_with_stopping(stopping, links)
    for link in links[1:]:
        if link.filters_prompt:
            raise PolicyError(
                f"{link} shortens the prompt before any layer runs, so it must be the first link of a chain and its "
                f"only filter: write {link} | ... and leave other filters out."
            )
    renumbering = next((link for link in links if link.renumbers), None)
    for link in links if renumbering is not None else ():
        if link.codecs or link.filters_prompt or link.turns_back:
            what = "packs keys, which cannot be turned any more" if link.codecs else "has placed the prompt anew itself"
            what = "turns queries and keys back from where they were in the text" if link.turns_back else what
            raise PolicyError(
                f"{renumbering} shows rows at their places in the cache, and {link} {what}: write "
                f'positions="original", or leave {type(link).__name__} out.'
            )
    packing = [index for index, link in enumerate(links) if link.codecs]
    if len(packing) > 1:
        first, second = (type(links[index]).__name__ for index in packing[:2])
        raise PolicyError(
            f"{first} and {second} cannot both quantize the cache: what {first} has packed is final. Keep one of them."
        )
    for index in packing:
        late = next((link for link in links[index + 1 :] if link.evicts), None)
        if late is not None:
            name, other = type(links[index]).__name__, type(late).__name__
            raise PolicyError(
                f"{name} | {other} would quantize tokens that {other} is about to drop, and let them take part in the "
                f"parameters of those that stay: write {other}(...) | {name}(...), which drops them first."
            )


def _check_with_stopping(stopping: Any, links: tuple[Any, ...]) -> None:
    name = type(stopping).__name__
    filtering = next((link for link in links if link.filters_prompt), None)
    if filtering is not None:
        raise PolicyError(
            f"{filtering} leaves layers the tokens that the whole prompt needs, and {stopping} lets more of those stop "
            "by what is left of the prompt: neither was made for that. Keep one of them."
        )
    if links[0] is not stopping or any(link.stops_tokens for link in links[1:]):
        raise PolicyError(
            f"{stopping} decides what layers are given at all, so it must be the first link of a chain and the only "
            f"one of its kind: write {stopping} | ... and leave others out."
        )
    for link in links[1:]:
        share = getattr(link, "share", None)
        reason = (
            "packs rows in the order they come in, and tokens that go on later come out of order"
            if link.codecs and getattr(stopping, "revives", False)
            else "shows rows at their places in the cache, which tokens that stopped have none in" if link.renumbers
            else "reads the prompt again, through layers that lack some of it" if link.replay is not None
            else "shares rows out over heads or layers that hold different tokens" if link.decides_together
            or getattr(share, "scope", "head") != "head"
            else "asks what every head adds to the output, and some heads stop" if link.weighs_outputs
            and getattr(stopping, "drops_heads", False)
            else "has a budget in bytes, and nobody knows beforehand what tokens that stopped will take of it"
            if getattr(getattr(link, "_budget", None), "in_bytes", False) else None
        )  # fmt: skip
        if reason is not None:
            raise PolicyError(f"{link} {reason}, so it cannot follow {name}: use one of them alone.")
