"""What happens around a forward pass. A policy comes here by its `attach`, which is called when its cache is made.

filters         `PromptFilter`: the policies that shorten a prompt before the layers run
choosing        what is asked of them
prompt_filter   a hook on the decoder that changes what it is given
filter_pass     the pass in which the first layers look at a prompt, and of which nothing is kept
"""

from kvprune.passes.filters import PromptFilter

__all__ = ["PromptFilter"]
