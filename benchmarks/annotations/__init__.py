"""How long does a list of 10 million videos take to load, and how much memory?"""
