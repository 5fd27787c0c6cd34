"""What an exported classifier answers and how fast it is, in full precision and in 8 bits."""
