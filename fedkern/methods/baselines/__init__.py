"""Baselines: published methods that the five papers are compared with, a file each."""
