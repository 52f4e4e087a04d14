"""What every operator shares: choice of the backend, loading of the cores, checks, memory, torch.library."""
