"""The aggregate family in Triton."""
