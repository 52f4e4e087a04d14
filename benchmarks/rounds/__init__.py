"""Rounds of FedAvg by fedkern, by a lean loop and by other frameworks, all of one task: see bench_rounds.py.

A framework has one adapter here, which runs in a process of its own, in the virtual environment that has the framework:
nothing that an adapter or ``task`` imports may be more than torch, NumPy and that framework.
"""
