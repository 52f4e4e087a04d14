"""Files: paths as users write them, atomic writes, locks, and rows of images that are read when they are needed."""
