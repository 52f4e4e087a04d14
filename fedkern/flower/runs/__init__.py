"""Whole fedkern runs on Flower's nodes."""
