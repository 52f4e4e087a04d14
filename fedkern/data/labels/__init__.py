"""Labels: several an image, and values that are written in several ways."""
