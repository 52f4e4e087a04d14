"""Comparison of methods over seeds and settings: plan, runs, statistics and result files."""
