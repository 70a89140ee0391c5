"""Variable tracking: chains of assignments from variable to variable, spread over a text."""

from __future__ import annotations

from itertools import islice, pairwise

import numpy as np

from kvprune.evaluation.synthetic import words
from kvprune.evaluation.synthetic.draft import Draft, Stream, ask
from kvprune.evaluation.synthetic.filler import Filler, scatter

_OPENING = (
    "Read the following text carefully. It sets variables, some to a number and some to what another variable is. You "
    "will be asked about them at the end."
)


def variable_tracking(rng: np.random.Generator, filler: Filler, *, chains: int, hops: int) -> Draft:
    """The variables that have the value of the first chain: one is set to it, and `hops` more to one another.

    The other chains have other values; the statements of all of them are mixed, each chain in its order.
    """
    name_rng, value_rng, order_rng, depth_rng, filler_rng = rng.spawn(5)
    names, values = map(str.upper, words.invented(name_rng)), list(islice(words.numbers(value_rng, digits=5), chains))
    variables = [list(islice(names, hops + 1)) for _ in values]
    chained = [
        iter([f"Let {chain[0]} = {value}.", *(f"Let {to} = {of}." for of, to in pairwise(chain))])
        for chain, value in zip(variables, values, strict=True)
    ]
    statements = [next(chained[chain]) for chain in order_rng.permutation(np.repeat(np.arange(chains), hops + 1))]
    depths = np.sort(100 * depth_rng.random(len(statements))).tolist()
    sentences = Stream(filler.stream(filler_rng))

    def body(count: int) -> str:
        return " ".join(scatter(sentences.first(count), statements, depths))

    question = f"Which variables have the value {values[0]}? There are {hops + 1}. Reply with their names alone."
    return Draft(_OPENING, body, ask(question), tuple(variables[0]))
