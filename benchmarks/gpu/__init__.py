"""All work that needs a GPU, in short stages (`all.sh`)."""
