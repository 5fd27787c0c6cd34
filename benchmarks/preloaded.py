"""What every process of a benchmark needs, imported once before they are forked."""

from umt_hf.training import stage1, stage2

__all__ = ["stage1", "stage2"]
