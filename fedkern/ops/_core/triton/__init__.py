"""The operators' Triton kernels, one file per family, imported when a call first uses Triton.

With ``TRITON_INTERPRET=1`` at the first import, Triton runs kernels in Python on the host, on CPU tensors: thousands of
times slower.
"""

import triton

# Triton reads this setting when a kernel is decorated, which is when the files of this package are imported.
INTERPRETED: bool = triton.knobs.runtime.interpret
