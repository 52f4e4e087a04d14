"""Networks that users bring: how they are made, cut and kept."""
