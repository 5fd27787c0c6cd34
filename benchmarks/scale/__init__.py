"""How does training scale with processes, and what does a run of hundreds of GPUs need?"""
