"""Figures of networks and clients beyond those of every round, their intervals and diagnostics."""
