"""The distill family in Triton."""
