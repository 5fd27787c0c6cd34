"""How long does a search among 100 000 videos take?"""
