"""What does a stage-2 step cost, loss by loss?"""
