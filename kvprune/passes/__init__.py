"""What happens around a forward pass. A policy comes here by its `attach`, which is called when its cache is made.

filters         `PromptFilter`: the policies that shorten a prompt before the layers run
choosing        what is asked of them
prompt_filter   a hook on the decoder that changes what it is given
filter_pass     the pass in which the first layers look at a prompt, and of which nothing is kept
replays         `ReplayedEviction`: the policies that rank rows by what a second reading of a prompt gives to them
replay          a hook on the decoder that notes what comes in, and the second reading
positions       how many positions a model can be given
cascades        `Cascade`: the policies that let tokens stop between layers
between_layers  hooks on the decoder layers
trip            a forward pass in which tokens stop, and go on
scratch         caches of passes that read another cache and leave nothing in it
"""

from kvprune.passes.cascades import Cascade
from kvprune.passes.filters import PromptFilter
from kvprune.passes.replays import ReplayedEviction

__all__ = ["Cascade", "PromptFilter", "ReplayedEviction"]
