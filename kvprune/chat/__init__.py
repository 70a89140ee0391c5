"""Conversations on one cache.

templates      what is said, as the text that a model reads
reading        documents into a cache
streaming      what a model says, as text that comes
conversation   `Chat`
terminal       `kvprune chat`
"""
