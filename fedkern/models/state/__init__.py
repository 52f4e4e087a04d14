"""Frozen and personal parts of a network, and memory for its tensors."""
