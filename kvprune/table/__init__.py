"""The cache of a layer as a table: rows are cached tokens, columns are what is known of them.

    token_table   `TokenTable`: what rows mean, how they come and go, and what policies see of them
    storage       `Storage`: where rows lie in memory
    contents      what is in it, and how many bytes it takes; view: a table as one link of a chain sees it
    packing       packed rows among the others; packed_rows: those of one codec; quantize: codecs
    basis         `Basis`: coordinates of a prompt's own, for codecs that turn keys and values; rotated_rows: their rows
    spreading     rotations that spread what counts over all components
    operations    `RowOperations`: what is done to rows and has faster implementations in `kvprune.kernels`
    rows          functions on tensors of rows, each head having an index of its own

Shapes are written with the same letters everywhere in kvprune:

    B    sequences of the batch          L    new tokens of a step, or queries
    Hq   query heads                     S    rows of a table (its slots in use), or keys
    Hkv  KV heads                        D    size of a key; Dv of a value
    G    query heads of a KV head: Hq = Hkv * G
"""

from kvprune.table.quantize import Codec
from kvprune.table.rows import EMPTY
from kvprune.table.token_table import TokenTable

__all__ = ["EMPTY", "Codec", "TokenTable"]
