"""Integrations with other tools: LongBench, lm-evaluation-harness, and Ray Serve."""
