"""`python -m umt_hf.cli`, and `accelerate launch -m umt_hf.cli` for several processes."""

from . import app

app()
