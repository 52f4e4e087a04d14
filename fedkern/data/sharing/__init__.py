"""Sharing: how samples go to clients, what each keeps for tests, and what differs between clients."""
