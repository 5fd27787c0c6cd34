"""`python -m umt_hf.cli`, and `accelerate launch -m umt_hf.cli` for several processes."""

from . import app

if __name__ == "__main__":  # not where all modules are imported to look at them
    app()
