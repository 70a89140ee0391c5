"""Caches in files. To import this gives `PrunedCache` what its `save` and `load` use.

files         one safetensors file a cache, and what is checked when one is read
heads         how much the heads of a model look back, measured once
rotations     what turns the keys and values of a model's layers, measured once
measured      the files of both
fingerprint   which model a cache belongs to
"""

from kvprune.cache.pruned_cache import PrunedCache
from kvprune.saving import files

PrunedCache.files = files

__all__ = ["PrunedCache"]
