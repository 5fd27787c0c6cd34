"""Both pre-training stages: what `umt-hf pretrain` runs, in one loop on Accelerate."""
