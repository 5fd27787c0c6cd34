"""What does the training loop cost beyond its step?"""
