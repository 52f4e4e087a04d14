"""Baselines: published methods to compare the five papers with, a file each."""
