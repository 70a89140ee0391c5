"""Routers that are trained: which tokens compute a layer, and which go past it. `kvprune.policies.FTP` routes by one.

gates         what a gate is told of a token, four numbers, and what it makes of them
training      gradients through a model whose tokens go past layers
router        `Router`: the gates of all layers of a model; they are fitted, and kept in a file
"""

from kvprune.routing.router import Router

__all__ = ["Router"]
