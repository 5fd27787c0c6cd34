"""How many training clips a second does one core make of video files?"""
