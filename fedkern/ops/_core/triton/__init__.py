"""The operators' Triton kernels, one file per family, imported only when Triton is to serve a call.

With ``TRITON_INTERPRET=1`` in the environment when this package is first imported, Triton runs every kernel in Python
on the host, program by program: thousands of times slower, but on CPU tensors and without a GPU.
"""

from __future__ import annotations

import triton

# Triton reads this setting when a kernel is decorated, which is when the files of this package are imported.
INTERPRETED: bool = triton.knobs.runtime.interpret
