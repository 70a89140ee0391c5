"""Attention over a table, and the mass that its rows get."""
