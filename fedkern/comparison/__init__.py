"""Comparison of methods over seeds and settings: the plan, its runs, their statistics and the files of the result."""
