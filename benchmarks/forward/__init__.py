"""How fast is the encoder beside those of Transformers?"""
