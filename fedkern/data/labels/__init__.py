"""Labels: several per image, and values written in several ways."""
