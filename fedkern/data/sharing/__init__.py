"""Sharing: partitions, the clients' own tests, and differences between clients."""
