"""What do fewer tokens at inference cost in accuracy, and what do they save?"""
