"""Hostile files: made from a seed, compared with an independent decode, and run as `make faults`."""
