"""Long-context tasks of any length, generated: the families of RULER (arXiv 2404.06654), in words of our own."""

from __future__ import annotations

from kvprune.evaluation.synthetic.heatmap import depth_maps, plot_depths
from kvprune.evaluation.synthetic.suite import FAMILIES, NOTES_FAMILIES, Synthetic

__all__ = ["FAMILIES", "NOTES_FAMILIES", "Synthetic", "depth_maps", "plot_depths"]
