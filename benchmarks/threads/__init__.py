"""How many threads should a process train with on a CPU?"""
