"""The embedded data set: moving shapes as video files, a toy teacher and text tower for them, and a tour."""
