"""How fast is one whole stage-1 training step?"""
