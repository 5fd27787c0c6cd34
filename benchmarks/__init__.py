"""Benchmarks: a folder per question, each with its script, its table and its baselines."""
