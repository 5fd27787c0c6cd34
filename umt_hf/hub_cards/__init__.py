"""The Hub: released checkpoints and their conversion, model cards, publishing."""
