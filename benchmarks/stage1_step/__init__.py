"""How fast is one complete stage-1 training step?"""
