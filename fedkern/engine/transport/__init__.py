"""Connections between the processes of a run, and the ranks of torchrun."""
