"""Metrics as local `evaluate.Metric` classes."""
