"""Where the clients of a run work: the round loop asks an executor for their answers, in client order."""
