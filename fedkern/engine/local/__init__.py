"""A client's work: networks, samples, training loops, privacy, captured steps, lanes."""
