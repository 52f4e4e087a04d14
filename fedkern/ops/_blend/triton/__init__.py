"""blend and boxes in Triton."""
