"""Data for training: datasets, samplers, collators and the built-in moving_shapes generator."""
