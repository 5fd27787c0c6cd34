"""Lists of videos: where they are, what their columns mean, and boxes at key frames."""
