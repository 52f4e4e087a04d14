"""Live output: what a run shows while it goes on."""
