"""Base of all operators: choice of the backend, loading of the cores, checks, memory, torch.library."""
