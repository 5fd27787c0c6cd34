"""Frozen towers whose features and saliency the student learns from."""
