"""Networks of Unmasked Teacher and what belongs to them; every file here can travel to the Hub alone."""
