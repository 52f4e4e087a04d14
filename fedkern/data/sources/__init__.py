"""Sources: where the samples of a federation come from."""
