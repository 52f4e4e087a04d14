"""Settings of a run: their defaults, their checks, and the file that stores them."""
