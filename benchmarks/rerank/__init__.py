"""What does re-ranking cost, from videos, from their tokens, from their keys and values?"""
