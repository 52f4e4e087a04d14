"""fedkern: fast kernels for federated learning, and five published methods built on them.

``fedkern.ops`` holds the operators and ``fedkern.methods`` the methods; ``python -m fedkern.run`` runs a method.
"""

from __future__ import annotations

from importlib import metadata

try:
    __version__ = metadata.version("fedkern")
except metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
