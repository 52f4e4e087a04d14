"""aggregate: weighted and robust averages of flat model vectors, server optimisers, clipping and noise."""
