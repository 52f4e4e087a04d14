"""Files: user paths, atomic writes, locks, and image rows that are read on demand."""
