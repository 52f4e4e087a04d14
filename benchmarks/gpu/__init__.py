"""Everything that is to be done where there is a GPU, in short stages (`all.sh`)."""
