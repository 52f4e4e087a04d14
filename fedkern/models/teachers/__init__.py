"""Frozen teachers: networks that give logits, their cache on disk, and their training."""
