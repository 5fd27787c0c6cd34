"""The Hub: released checkpoints, model cards, publishing."""
