"""The Hub: released checkpoints, their conversion, and model cards."""
