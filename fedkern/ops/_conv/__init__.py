"""conv: convolution, batch or group norm, residual, ReLU and max pooling as one operator."""
