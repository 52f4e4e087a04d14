"""Images: files, their cache, what a network sees of them, and the background in them."""
