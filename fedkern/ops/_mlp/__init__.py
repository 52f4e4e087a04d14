"""mlp: loss and gradients of linear layers with ReLU between them, in one call."""
