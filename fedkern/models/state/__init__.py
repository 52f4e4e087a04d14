"""Parts of a network's state that do not travel, and memory for it."""
