"""Both pre-training stages: what `accelerate launch` runs, in one loop on Accelerate."""
