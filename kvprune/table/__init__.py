"""Rows and columns: what a layer holds."""
