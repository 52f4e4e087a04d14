"""Executors, in which a run's clients work.  The round loop gets the clients' answers from one, in client order."""
