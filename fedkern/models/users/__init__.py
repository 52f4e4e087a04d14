"""User-defined networks: how they are made, cut and kept."""
