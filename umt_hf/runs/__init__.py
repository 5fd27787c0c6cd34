"""What a run is given and what it leaves: recipes and flags, file names, settings and figures read back."""
