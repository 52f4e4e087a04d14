"""Figures: the pictures of a run folder."""
