"""Executors, which run clients and yield their answers to the round loop in client order."""
