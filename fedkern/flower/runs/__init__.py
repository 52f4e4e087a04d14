"""Whole runs of fedkern on Flower's nodes."""
