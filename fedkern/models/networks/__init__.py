"""Networks, each in a file."""
