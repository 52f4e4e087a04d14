"""blend in Triton."""
