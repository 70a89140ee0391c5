"""Integrations with other tools: LongBench and lm-evaluation-harness."""
