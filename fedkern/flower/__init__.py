"""Faster aggregation for Flower apps: `fedkern.flower.strategies`, and flat messages for clients (`flat_arrays`)."""
