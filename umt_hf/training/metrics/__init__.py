"""Metrics as local `evaluate.Metric` classes and on-device averages."""
