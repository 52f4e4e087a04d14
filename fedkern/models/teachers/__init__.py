"""Frozen teachers: networks that answer, their cache on disk, and their training."""
