"""`PrunedCache`, and all that transformers sees of it.

    pruned_cache   the object that takes the place of `DynamicCache` in `generate()`: how it is made, saved and loaded
    forward_pass   what the model asks of it; rolling_back: what `generate()` asks in between; contents: what people ask
    step           what one attention layer does at every forward pass; layer: and in between
    plans          what the policies of a layer are told, and the attention mass that they ask for
    steady         the counts of a layer whose decode steps change no shape any more
    registration   the kvprune attention, as transformers knows it
    models         what is asked of a model: its config, layer by layer, and an attention that can be reached
    stock          layers that are not pruned; modes: autocast, inference mode, gradients
    progress       whether the last forward pass came to its end
    selection      what a prompt filter chose
    report         what people are told

Shapes: see `kvprune.table`.
"""

from kvprune.cache.pruned_cache import PrunedCache
from kvprune.cache.report import CacheReport

__all__ = ["CacheReport", "PrunedCache"]
