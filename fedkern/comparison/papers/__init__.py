"""Published tables as data, a TOML file for every paper.

The format is that of `fedkern.comparison.published`.
"""
