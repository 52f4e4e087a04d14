"""Sources of a federation's samples."""
