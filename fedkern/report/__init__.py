"""Output for people: progress, tables and pictures of a run, and the state of the installation."""
