"""Pixels and words to tensors: decoding, frame sampling, processors, augmentation."""
