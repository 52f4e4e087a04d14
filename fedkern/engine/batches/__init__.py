"""Readers: splits in batches."""
