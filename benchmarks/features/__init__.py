"""How much memory do the features of a 10-minute video take?"""
