"""What `accelerate launch` runs: both pre-training stages, fine-tuning, their data, optimisation and checkpoints."""
