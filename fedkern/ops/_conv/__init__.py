"""conv: convolution, batch norm, residual, ReLU and max pooling as one operator."""
