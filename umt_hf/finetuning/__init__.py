"""Fine-tuning with the Trainer of Transformers: each module but `trainer` is a script."""
