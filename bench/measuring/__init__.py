"""What is measured: a prompt and its answer, by the clock and in bytes, or documents and their questions."""
