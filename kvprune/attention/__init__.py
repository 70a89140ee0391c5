"""Attention over a table, exact, and the one statistic of it that nearly every published score is made of.

    queries      the queries of one step: what they see of a table, their output, and the mass they give to its rows
    softmax      outputs over rows in full precision; packed: over packed rows; backends: what a prompt runs on
    mass         `attention_mass`, which rows it weighs (`RowWeights`), and how a model scores (`Scoring`)
    noise        noise on logits, the same wherever it is asked for
    operations   `AttentionOperations`: what of this has faster implementations in `kvprune.kernels`

Shapes: see `kvprune.table`.
"""

from kvprune.attention.mass import RowWeights, Scoring, attention_mass

__all__ = ["RowWeights", "Scoring", "attention_mass"]
