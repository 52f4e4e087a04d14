"""Published tables as data, a TOML file for every paper; the format is that of `fedkern.comparison.published`."""
