"""Published tables as data, a TOML file for every paper (see `fedkern.comparison.published`)."""
