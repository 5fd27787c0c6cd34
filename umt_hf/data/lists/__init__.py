"""Lists of videos as files and folders have them."""
