"""How long a checkpoint takes to write."""
