"""optimise: one step of an optimiser on flat vectors."""
