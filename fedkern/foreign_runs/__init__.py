"""Runs of any program: ``fedkern.record`` writes them, and comparisons read them. Nothing here imports torch."""
