"""Published methods, one file each. `get("a2sf", budget=0.25)` makes one by name; `names()` lists them.

To add one, see CONTRIBUTING.md: a policy is a page.
"""

from kvprune.policies.a2sf import A2SF
from kvprune.policies.adakv import AdaKV
from kvprune.policies.bits import Bits
from kvprune.policies.criticalkv import CriticalAdaKV, CriticalKV
from kvprune.policies.dropkv import DropKV
from kvprune.policies.expected_attention import ExpectedAttention
from kvprune.policies.ftp import FTP
from kvprune.policies.full import Full
from kvprune.policies.gemfilter import GemFilter
from kvprune.policies.h2o import H2O
from kvprune.policies.keydiff import KeyDiff
from kvprune.policies.keyformer import Keyformer
from kvprune.policies.kivi import KIVI
from kvprune.policies.knorm import Knorm
from kvprune.policies.kvcrush import KVCrush
from kvprune.policies.kvzip import KVzip, KVzipPlus
from kvprune.policies.lazyllm import LazyLLM
from kvprune.policies.leverage import Leverage
from kvprune.policies.oscar import OSCAR
from kvprune.policies.pyramiddrop import PyramidDrop
from kvprune.policies.pyramidkv import PyramidKV
from kvprune.policies.random import Random
from kvprune.policies.snapkv import SnapKV
from kvprune.policies.spatten import SpAtten
from kvprune.policies.spectral import Spectral
from kvprune.policies.streaming_llm import StreamingLLM
from kvprune.policies.tova import TOVA
from kvprune.policies.tri_attention import TriAttention
from kvprune.policies.turboquant import TurboQuant
from kvprune.policies.zipcache import ZipCache
from kvprune.policies.zipvl import ZipVL
from kvprune.policy.registry import find, get, names, parse

__all__ = [
    "A2SF",
    "FTP",
    "H2O",
    "KIVI",
    "OSCAR",
    "TOVA",
    "AdaKV",
    "Bits",
    "CriticalAdaKV",
    "CriticalKV",
    "DropKV",
    "ExpectedAttention",
    "Full",
    "GemFilter",
    "KVCrush",
    "KVzip",
    "KVzipPlus",
    "KeyDiff",
    "Keyformer",
    "Knorm",
    "LazyLLM",
    "Leverage",
    "PyramidDrop",
    "PyramidKV",
    "Random",
    "SnapKV",
    "SpAtten",
    "Spectral",
    "StreamingLLM",
    "TriAttention",
    "TurboQuant",
    "ZipCache",
    "ZipVL",
    "find",
    "get",
    "names",
    "parse",
]
