"""Classes of many videos: with their probabilities, and in files."""
