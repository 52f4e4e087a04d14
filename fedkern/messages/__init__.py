"""Nested values with tensors, packed as files of states, and as packets between processes of one run."""
