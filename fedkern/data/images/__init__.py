"""Images: files, their cache, network inputs and backgrounds."""
