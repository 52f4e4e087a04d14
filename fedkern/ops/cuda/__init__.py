"""The CUDA kernels of ``fedkern._cuda``: one launcher class per family, from tensors to pointers on torch's stream."""
