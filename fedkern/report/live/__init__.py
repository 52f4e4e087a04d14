"""Live output during a run."""
