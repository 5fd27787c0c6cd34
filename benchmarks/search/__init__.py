"""How long does a search among a million videos take?"""
