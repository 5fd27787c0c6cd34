"""Does a video teacher beside an image teacher help motion?"""
